"""The trainer's configuration: frozen dataclasses, validated where they are made, and the flags."""

import contextlib
import dataclasses
import difflib
import io
import json
import math
import operator
import shutil
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import tyro

from jfp4.models.config import MODELS, LlamaConfig
from jfp4.ops.exchange import GradComm
from jfp4.ops.ffi import Backend
from jfp4.recipe import RECIPES, Recipe
from jfp4.sharding import RULES, parse_mesh
from train.errors import UserError, mendable

PROGRAM = "python -m train.main"

_FLAG_NAMES = {"llama": "model", "quantization": "recipe"}
"""Fields whose flags have another name: --model is a preset, --model.num_layers overrides it."""

_ONLY_ON = ("resume", "plan")
"""Fields without a flag that turns them off: FlagCreatePairsOff."""


def _require(ok: bool, name: str, value: Any, expected: str) -> None:
    if not ok:
        raise UserError(f"{name}={value}; expected {expected}")


def _require_known(name: str, value: str, known: dict[str, Any]) -> None:
    if value not in known:
        near = difflib.get_close_matches(value, known, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"{name}={value!r} is unknown; {hint}there are {', '.join(known)}")


def _require_processes(coordinator: str | None, count: int | None, number: int | None) -> None:
    if coordinator in (None, "auto"):
        given = "num_processes" if count is not None else "process_id"
        value = count if count is not None else number
        _require(
            count is None and number is None, given, value, "none without --coordinator=HOST:PORT"
        )
        return
    assert coordinator is not None
    _require(":" in coordinator, "coordinator", coordinator, "HOST:PORT or auto")
    _require(count is not None and count >= 1, "num_processes", count, ">= 1 with --coordinator")
    assert count is not None
    valid = number is not None and 0 <= number < count
    _require(valid, "process_id", number, f"0 to {count - 1}, with --num_processes={count}")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule; the defaults are those of arXiv 2501.17116, section 4.1."""

    warmup: float = 0.05
    """Share of the steps over which the learning rate rises linearly."""

    final_lr: float = 0.1
    """Learning rate that a cosine from the peak reaches after the last step, as its share."""

    weight_decay: float = 0.1
    """Decoupled weight decay of matrices (norm scales have none)."""

    beta1: float = 0.9
    """Decay rate of the first moment."""

    beta2: float = 0.95
    """Decay rate of the second moment."""

    eps: float = 1e-8
    """Added to the root of the second moment."""

    clip_norm: float | None = 1.0
    """Largest global norm of a gradient; None clips nothing."""

    accumulation: int = 1
    """Microbatches a step: batch_size is split into as many. With bfloat16 weights, in which their
    gradients are added up, at most 256: sums of more stand still."""

    master: Literal["float32", "float16", "bfloat16"] = "float32"
    """What weights are kept in. float16 and bfloat16 are rounded stochastically, and so narrow are
    their gradients too; float16 holds magnitudes under 64 and brings a loss scale. Norm scales stay
    float32."""

    first_moment: Literal["float32", "float16", "e4m3"] = "float32"
    """What Adam's first moment is kept in; other than float32 with a scale for 128 elements."""

    second_moment: Literal["float32", "float16"] = "float32"
    """What the root of Adam's second moment is kept in, likewise."""

    rounding: Literal["nearest", "stochastic"] = "stochastic"
    """How moments other than float32 are rounded. To nearest, those that decay by less than half a
    step of their format stand still, and what they move goes on moving."""

    max_skipped: int = 20
    """Steps in a row without a finite gradient after which the run stops."""

    def __post_init__(self) -> None:
        for name in ("master", "first_moment", "second_moment", "rounding"):
            known = get_args(get_type_hints(OptimizerConfig)[name])
            _require_known(f"optimizer.{name}", getattr(self, name), dict.fromkeys(known))
        _require(0 <= self.warmup <= 1, "optimizer.warmup", self.warmup, "a share from 0 to 1")
        _require(0 <= self.final_lr <= 1, "optimizer.final_lr", self.final_lr, "a share, 0 to 1")
        decays = 0 <= self.weight_decay < math.inf
        _require(decays, "optimizer.weight_decay", self.weight_decay, ">= 0 and finite")
        _require(0 <= self.beta1 < 1, "optimizer.beta1", self.beta1, "0 <= beta1 < 1")
        _require(0 <= self.beta2 < 1, "optimizer.beta2", self.beta2, "0 <= beta2 < 1")
        _require(0 < self.eps < math.inf, "optimizer.eps", self.eps, "> 0 and finite")
        clips = self.clip_norm is None or self.clip_norm > 0
        _require(clips, "optimizer.clip_norm", self.clip_norm, "> 0 or None")
        _require(self.accumulation >= 1, "optimizer.accumulation", self.accumulation, ">= 1")
        holds = self.master != "bfloat16" or self.accumulation <= 256
        most = "<= 256 with optimizer.master=bfloat16"
        _require(holds, "optimizer.accumulation", self.accumulation, most)
        _require(self.max_skipped >= 1, "optimizer.max_skipped", self.max_skipped, ">= 1")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved."""

    every: int = 100
    """Steps between saves; the last step and an interrupt save as well. 0: only an interrupt."""

    keep: int = 2
    """Newest checkpoints kept."""

    host_gib: float | None = None
    """Largest state, in GiB of this process's devices, that is copied to host memory whole and
    written while training goes on; a larger one goes in parts of that size, and training waits.
    None: a quarter of the memory that is free when the run begins, shared by a host's processes."""

    def __post_init__(self) -> None:
        _require(self.every >= 0, "checkpoint.every", self.every, ">= 0")
        _require(self.keep >= 1, "checkpoint.keep", self.keep, ">= 1")
        known = self.host_gib is None or 0 < self.host_gib < math.inf
        _require(known, "checkpoint.host_gib", self.host_gib, "> 0, finite, or None")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is written beside the checkpoints."""

    every: int = 10
    """Steps between reading metrics from the device (each step still gets its own line)."""

    health_every: int = 100
    """Steps between measuring quantisation health, layer by layer; 0 never."""

    def __post_init__(self) -> None:
        _require(self.every >= 1, "log.every", self.every, ">= 1")
        _require(self.health_every >= 0, "log.health_every", self.health_every, ">= 0")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Trains a Llama, by default a small one in FP4 on Python's own standard library."""

    model: str = "llama5m"
    """Model size: llama5m, llama60m, llama130m, llama400m, llama1b, llama7b or llama13b."""

    recipe: str = "fp4"
    """Quantisation preset: bf16, fp8, fp4 or fp4_cast."""

    data: str = "pystdlib"
    """pystdlib, or a path to text, JSON Lines (.gz too), Parquet, or prepared shards."""

    tokenizer: str | None = None
    """bytes, or a tokenizer.json; None takes that of prepared shards, and bytes elsewhere."""

    steps: int = 250
    """Optimizer steps of the whole run."""

    batch_size: int = 8
    """Sequences a step."""

    seq_len: int = 256
    """Tokens a sequence."""

    lr: float = 3e-3
    """Peak learning rate."""

    seed: int = 0
    """Seed of the initial weights and of the data order."""

    config: str | None = None
    """A TOML file of flags, such as configs/gpu8-fsdp.toml; flags given beside it override it."""

    mesh: str | None = None
    """Devices along data, fsdp and tensor, such as data=2,fsdp=-1 (-1: the rest); None: one."""

    grad_comm: GradComm | None = None
    """What devices send one another of gradients over data and fsdp: float32, bfloat16, or fp8, a
    quarter of float32's bytes; None: what gradients are kept in, bfloat16 beside bfloat16 weights
    and else float32."""

    coordinator: str | None = None
    """HOST:PORT of process 0, where there are several; auto under SLURM and on TPU slices."""

    num_processes: int | None = None
    """Processes of the run, with --coordinator."""

    process_id: int | None = None
    """Which of them this is, from 0."""

    backend: Backend | None = None
    """What computes quantised layers: auto, xla, host or cuda; None takes JFP4_BACKEND, or auto."""

    run_dir: str | None = None
    """Where the run is written; None makes a new runs/MODEL-RECIPE-DATE-TIME."""

    eval_every: int = 100
    """Steps between evaluations; the last step is evaluated as well."""

    eval_batches: int = 16
    """Most validation batches an evaluation takes, always the same ones, all full."""

    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Go on from the last checkpoint in run_dir."""

    profile: int = 0
    """Steps to trace into run_dir/profile, for TensorBoard or Perfetto, once the first are done; of
    several processes the first one's."""

    deterministic: bool = False
    """Only sums in one order: on a GPU too, equal steps are then equal bit for bit, and a run that
    was resumed is the one that was not. Attention's backward and the embedding's are slower so."""

    plan: tyro.conf.FlagCreatePairsOff[bool] = False
    """Only say what memory the run takes; exit 0 if it fits the device, 2 if not. Of a mesh of
    other devices than are here only the numbers are said, and the exit is 0."""

    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    llama: Annotated[LlamaConfig, tyro.conf.arg(name="model")] = MODELS["llama5m"]
    quantization: Annotated[Recipe, tyro.conf.arg(name="recipe")] = RECIPES["fp4"]

    @property
    def gradients_sent_in(self) -> GradComm:
        """``grad_comm``, or where it is None what gradients are kept in."""
        return sent_in(self.grad_comm, self.optimizer.master)

    def __post_init__(self) -> None:
        _require_known("model", self.model, MODELS)
        _require_known("recipe", self.recipe, RECIPES)
        if self.backend is not None:
            _require_known("backend", self.backend, dict.fromkeys(get_args(Backend)))
        if self.mesh is not None:
            try:
                parse_mesh(self.mesh)
            except ValueError as error:
                raise UserError(f"mesh={error}") from None
        if self.grad_comm is not None:
            _require_known("grad_comm", self.grad_comm, dict.fromkeys(get_args(GradComm)))
        _require(
            self.grad_comm != "fp8" or self.quantization.quantizes,
            "grad_comm",
            self.grad_comm,
            f"float32 or bfloat16 with recipe={self.recipe}, which quantises nothing",
        )
        _require_processes(self.coordinator, self.num_processes, self.process_id)
        _require(self.data != "", "data", "''", '"pystdlib" or a path')
        _require(self.run_dir != "", "run_dir", "''", "a directory")
        for name in ("steps", "batch_size", "seq_len", "eval_every", "eval_batches"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "a positive number")
        _require(self.profile >= 0, "profile", self.profile, ">= 0")
        _require(0 < self.lr < math.inf, "lr", self.lr, "> 0 and finite")
        _require(0 <= self.seed < 2**31, "seed", self.seed, "0 <= seed < 2**31")
        accumulation = self.optimizer.accumulation
        _require(
            self.batch_size % accumulation == 0,
            "batch_size",
            self.batch_size,
            f"a multiple of optimizer.accumulation, {accumulation}",
        )


def sent_in(grad_comm: GradComm | None, master: str | None) -> GradComm:
    """What gradients are sent in, with these values of ``grad_comm`` and ``optimizer.master``."""
    if grad_comm is not None:
        return grad_comm
    return "bfloat16" if master == "bfloat16" else "float32"


def parse(args: Sequence[str]) -> TrainConfig:
    """Parses the command line; presets first, then whatever overrides them.

    With --resume the defaults are those of the run in --run_dir, so that nothing else need be
    given again.

    Raises:
        UserError: an unknown flag, preset or value, with near names; a flag that can change
            nothing.
        SystemExit: after ``--help``.
    """
    file = value_of("config", list(args), None)
    args = [*(() if file is None else flags_of(Path(file))), *args]
    kept = _kept_config(args)
    model = value_of("model", args, kept.model)
    recipe = value_of("recipe", args, kept.recipe)
    _require_known("model", model, MODELS)
    _require_known("recipe", recipe, RECIPES)
    default = dataclasses.replace(
        kept,
        model=model,
        recipe=recipe,
        llama=kept.llama if model == kept.model else MODELS[model],
        quantization=kept.quantization if recipe == kept.recipe else RECIPES[recipe],
    )
    config = parse_flags(TrainConfig, args, PROGRAM, default)
    if config.resume and config.run_dir is None:
        raise UserError("--resume needs to know which run: give --run_dir")
    for name, why in _inert(config).items():
        value_in = operator.attrgetter(name)
        if value_in(config) != value_in(default):
            group, dot, last = name.rpartition(".")
            flag = f"{_FLAG_NAMES.get(group, group)}{dot}{last}"
            raise UserError(f"--{flag}={value_in(config)} changes nothing, since {why}")
    return config


def _inert(config: TrainConfig) -> dict[str, str]:
    """The fields, by dotted names, that change nothing, and what makes it so."""
    inert = {f"quantization.{name}": why for name, why in config.quantization.inert.items()}
    optimizer = config.optimizer
    if optimizer.first_moment == optimizer.second_moment == "float32":
        inert["optimizer.rounding"] = "both moments are float32"
    sizes = {} if config.mesh is None else parse_mesh(config.mesh)
    divided = any(sizes.get(axis, 1) != 1 for axis in RULES["batch"])  # -1 may be more than one
    if not divided and config.gradients_sent_in != sent_in(None, optimizer.master):
        inert["grad_comm"] = f"mesh={config.mesh} sums no gradients over devices"
    return inert


def _kept_config(args: list[str]) -> TrainConfig:
    """The configuration of the run to resume, where the command line names one."""
    run_dir = value_of("run_dir", args, None)
    if "--resume" not in args or run_dir is None:
        return TrainConfig()
    path = Path(run_dir) / "config.json"
    try:
        with mendable(f"--run_dir={run_dir} cannot be read"):
            if not path.is_file():
                return TrainConfig()
            kept = from_dict(json.loads(path.read_text())["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run_dir}/config.json is damaged ({error}); choose another") from None
    kept = dataclasses.replace(kept, resume=False, plan=False, profile=0, config=None)
    return dataclasses.replace(kept, coordinator=None, num_processes=None, process_id=None)


def flags_of(file: Path) -> list[str]:
    """The flags that a TOML file holds: each key is the name of one, as on the command line.

    Raises:
        UserError: it cannot be read, or is no TOML, or holds what is no flag's value.
    """
    try:
        values = tomllib.loads(file.read_text())
    except OSError as error:
        raise UserError(f"--config={file} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"--config={file} is not TOML ({error})") from None
    flags: list[str] = []
    if "config" in values:
        raise UserError(f"--config={file}: it names another, {values['config']}; expected flags")
    for name, value in values.items():
        if not isinstance(value, str | int | float):
            raise UserError(
                f"--config={file}: {name} = {value}; expected a flag's value: text, a number or "
                "true or false, under the flag's whole name in quotes"
            )
        group, dot, last = name.rpartition(".")
        if isinstance(value, bool):
            off = () if name in _ONLY_ON else (f"--{group}{dot}no_{last}",)
            flags.extend((f"--{name}",) if value else off)
        else:
            flags.append(f"--{name}={value}")
    return flags


def parse_flags(cls: type[Any], args: Sequence[str], program: str, default: Any = None) -> Any:
    """Parses flags into a dataclass, every mistake being one line.

    Raises:
        UserError: an unknown flag, or a value that does not parse or validate.
        SystemExit: after ``--help``.
    """
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            config, unknown = tyro.cli(
                cls,
                args=list(args),
                prog=program,
                default=tyro.MISSING_NONPROP if default is None else default,
                config=(tyro.conf.AvoidSubcommands,),
                use_underscores=True,
                return_unknown_args=True,
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(f"{_first_paragraph(messages.getvalue())}; see {program} --help") from None
    if unknown:
        flags = _flags(cls, default)
        for flag, _, value in (arg.partition("=") for arg in args):
            group, _, name = flag.removeprefix("--").rpartition(".")
            off = f"--{group}.no_{name}" if group else f"--no_{name}"
            # A switch, whose value was taken for an argument of its own.
            if value == unknown[0] and flag in flags and (off in flags or name in _ONLY_ON):
                switches = " or ".join(f for f in (flag, off) if f in flags)
                raise UserError(f"{flag}={value}; expected {switches}, without a value")
        flag = unknown[0].split("=")[0]
        near = difflib.get_close_matches(flag, flags, n=2)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"unknown argument {unknown[0]!r}; {hint}see {program} --help")
    return config


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as nested dictionaries of plain values, for JSON."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """Inverse of ``to_dict``, also after JSON made lists of tuples.

    Raises:
        TypeError: a field that there is not, or none where there should be one.
    """
    nested = {
        "optimizer": OptimizerConfig,
        "checkpoint": CheckpointConfig,
        "log": LogConfig,
        "llama": LlamaConfig,
        "quantization": Recipe,
    }
    made = {
        name: cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values[name].items()})
        for name, cls in nested.items()
    }
    return TrainConfig(**{**values, **made})


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Names the fields in which two configurations differ, as "field (old, now new)"."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{_FLAG_NAMES.get(key, key)}.")
        elif a != b and not (isinstance(a, list | tuple) and list(a) == list(b or ())):
            found.append(f"{prefix}{key} ({a}, now {b})")
    return found


def value_of(name: str, args: list[str], default: Any) -> Any:
    """The value of --name in ``args``: some flags have to be known before the rest is parsed."""
    value = default
    for i, arg in enumerate(args):
        flag, equals, given = arg.partition("=")
        if flag.replace("-", "_") != f"__{name}":  # --run-dir is --run_dir to the parser
            continue
        if equals:
            value = given
        elif i + 1 < len(args):
            value = args[i + 1]
    return value


def _flags(cls: type[Any], default: Any) -> list[str]:
    """Every flag that the dataclass has, from the parser's own help."""
    text = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(text):
        parse_help(cls, default)
    return sorted({word.strip(",│") for word in text.getvalue().split() if word.startswith("--")})


def parse_help(cls: type[Any], default: Any) -> None:
    """Prints the help text and raises SystemExit."""
    tyro.cli(
        cls,
        args=["--help"],
        default=tyro.MISSING_NONPROP if default is None else default,
        config=(tyro.conf.AvoidSubcommands,),
        use_underscores=True,
    )


def _first_paragraph(box: str) -> str:
    """The sentence in a framed message: its lines between rules, without the frame."""
    words: list[str] = []
    for line in box.splitlines()[1:]:
        text = line.strip("│╭╮╰╯ ")
        if text.strip("─-"):
            words.append(text)
        elif words:
            break
    message = " ".join(words) or "the command line could not be read"
    for field, flag in _FLAG_NAMES.items():
        message = message.replace(f"parsing {field}:", f"parsing --{flag}:")
    return message


def run_program(
    act: Callable[[Any], object], config: type[Any], args: Sequence[str] | None, program: str
) -> int:
    """Parses flags, prints what ``act`` makes of them, and returns the exit status.

    Args:
        act: takes the configuration.
        config: a dataclass, a flag a field.
        args: the flags; None: those of the command line.
        program: what the help calls it.
    """
    try:
        print(act(parse_flags(config, sys.argv[1:] if args is None else args, program)))
    except UserError as error:
        return report_error(error)
    return 0


def report_error(error: UserError) -> int:
    """Prints the one line of a mistake on stderr; returns the exit status, 2."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def program() -> str:
    """The command that starts this program; by the path of Python where ``python`` is another.

    So it is in a virtual environment that was not activated.
    """
    found = shutil.which("python")
    own = found is not None and Path(found).parent == Path(sys.executable).parent
    return PROGRAM if own else PROGRAM.replace("python", sys.executable, 1)


def default_run_dir(config: TrainConfig, stamp: str) -> Path:
    """Where a run goes that names no place: runs/MODEL-RECIPE-STAMP."""
    return Path("runs") / f"{config.model}-{config.recipe}-{stamp}"
