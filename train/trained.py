"""The model that a run has trained, out of its directory, and its tokenizer."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from jfp4 import master
from jfp4.models.llama import Llama
from jfp4.recipe import RECIPES
from train import rundir
from train.checkpoint import check_holds, named_leaves, orbax_silent
from train.config import from_dict
from train.data import is_prepared
from train.errors import UserError
from train.step import Trainer
from train.tokenizer import Tokenizer, load


def load_model(run_dir: str | Path, step: int | None = None, *, quantize: bool = True) -> Llama:
    """The model of a run's checkpoint, on the default device, to be evaluated or trained on.

    Of the checkpoint parameters and calibration alone are read. Parameters are float32 values
    whatever the run kept them in, and calibration is the running one (``model.train()`` turns that
    off), so that a token's logits do not depend on the tokens beside it.

    Args:
        run_dir: of ``train.main``.
        step: of the checkpoint; None is the newest.
        quantize: compute as the run's recipe says; without, nothing is quantised.

    Raises:
        UserError: there is no such run, or no such checkpoint, or it cannot be read.
    """
    run_dir = Path(run_dir)
    config = from_dict(config_of(run_dir))
    steps = rundir.saved_steps(run_dir)
    if not steps or step not in (None, *steps):
        found = ", ".join(map(str, steps)) or "none"
        raise UserError(f"step={step} is not among the checkpoints of {run_dir}: {found}")
    # How attention and loss are computed is for the device that is there to say.
    config = dataclasses.replace(
        config, llama=dataclasses.replace(config.llama, attention="auto", loss_chunk=None)
    )
    if not quantize:
        config = dataclasses.replace(config, recipe="bf16", quantization=RECIPES["bf16"])
    trainer = Trainer(config)
    abstract = jax.eval_shape(trainer.init)
    part = dataclasses.replace(abstract, step=None, opt_state=None, loss_scale=None)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)
        for name, leaf in named_leaves(part).items()
    }
    step = steps[-1] if step is None else step
    path = (run_dir / "checkpoints" / str(step) / "default").absolute()
    reading = contextlib.closing(ocp.Checkpointer(ocp.PyTreeCheckpointHandler()))
    with orbax_silent(), reading as reader:
        check_holds(reader, path, wanted)
        restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
        arrays = reader.restore(
            path, args=ocp.args.PyTreeRestore(wanted, restore_args, partial_restore=True)
        )
    state = jax.tree.unflatten(jax.tree.structure(part), [arrays[name] for name in wanted])
    model: Llama = nnx.merge(trainer.graph, jax.tree.map(master.decode, state.params), state.stats)
    model.eval()
    return model


def config_of(run_dir: str | Path) -> dict[str, Any]:
    """The configuration of a run, as ``train.config.to_dict`` has it.

    Raises:
        UserError: there is no such run.
    """
    if not (Path(run_dir) / rundir.CONFIG).is_file():
        raise UserError(f"run_dir={run_dir} holds no run")
    config: dict[str, Any] = rundir.read(Path(run_dir))["config"]
    return config


def tokenizer_of(config: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a run with this configuration.

    Raises:
        UserError: the data of the run is not there, which it may be in, or it is one that cannot be
            read or that has more ids than the model.
    """
    found = load(_tokenizer(config["tokenizer"], config["data"]))
    vocab_size = config["llama"]["vocab_size"]
    if found.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer {found.name} has {found.vocab_size:,} ids, and the run's model a "
            f"vocabulary of {vocab_size:,}; it is not that of the run"
        )
    return found


def _tokenizer(named: str | None, data: str) -> str:
    if named is not None or data == "pystdlib":
        return named or "bytes"
    of_shards = Path(data) / "tokenizer.json"
    if is_prepared(data) and of_shards.is_file():
        return str(of_shards)
    if not Path(data).exists():  # else its ids would be taken for bytes
        raise UserError(f"data={data} of the run is not there, and so may be its tokenizer")
    return "bytes"
