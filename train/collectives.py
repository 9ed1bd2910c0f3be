"""What a compiled program sends between devices: its collectives, read from the text of its HLO."""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
from jax.stages import Compiled

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(\S+) = (.*?) ([a-z][\w-]*)\((.*)$")
_CALLED = re.compile(
    r"(?:to_apply|calls|body|true_computation|false_computation|branch_computations)="
    r"(\{[^}]*\}|%?[\w.-]+)"
)
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONSTANT = re.compile(r"s32\[\] constant\((\d+)\)")
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
        kind: one of ``KINDS``.
        bytes: of the whole array on one device: gathered, reduced, or sent.
        group: ids of the devices of the first group that share it; of a permute all that send or
            receive.
        times: how often a run of the program executes it, by the trip counts of its loops.
    """

    kind: str
    bytes: int
    group: tuple[int, ...]
    times: int

    @property
    def sent(self) -> float:
        """Bytes that each device sends in a run of the program, by the ring algorithms."""
        n = len(self.group)
        if self.kind == "collective-permute":
            return float(self.bytes * self.times)
        rounds = 2 if self.kind == "all-reduce" else 1
        return self.bytes * self.times * rounds * (n - 1) / n


def collectives(hlo: str) -> list[Collective]:
    """The collectives of an HLO module's text, those over a single device left out.

    An all-reduce of which every reader takes a slice is a reduce-scatter: the compilers of GPUs and
    TPUs make it one, that of CPUs does not. A loop without a known number of trips counts once.
    """
    computations, entry = _computations(hlo)
    found: list[Collective] = []

    def visit(name: str, times: int) -> None:
        for instruction in computations.get(name, ()):
            found.extend(_collective(instruction, computations[name], times))
            trips = 1
            if instruction.op == "while":
                trips = _trips(instruction.text, computations)
            for called in _CALLED.findall(instruction.text):
                if instruction.op not in KINDS and not instruction.op.startswith("reduce"):
                    for callee in called.strip("{}").split(","):
                        visit(callee.strip().lstrip("%"), times * trips)

    visit(entry, 1)
    return found


def summary(found: Iterable[Collective]) -> dict[str, tuple[int, float]]:
    """How many of each kind a run executes, and the bytes that a device sends for them."""
    found = list(found)
    return {
        kind: (sum(c.times for c in own), sum(c.sent for c in own))
        for kind in KINDS
        if (own := [c for c in found if c.kind == kind])
    }


def described(compiled: Compiled | None) -> list[str]:
    """A line for each kind of collective in a compiled step; none on one device."""
    text = compiled.as_text() if compiled is not None else None
    found = collectives(text) if text else []
    return [
        f"a step: {count:,} {kind}, {sent / 2**30:.3g} GiB sent by a device"
        for kind, (count, sent) in summary(found).items()
    ]


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    result: str
    op: str
    text: str


def _computations(hlo: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Every computation's instructions by its name, and the name of the entry."""
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", None
    for line in hlo.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head[1], [])
            entry = head[1] if line.startswith("ENTRY") else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current.append(_Instruction(*match.groups()))
    return computations, entry


def _collective(
    instruction: _Instruction, beside: list[_Instruction], times: int
) -> Iterator[Collective]:
    kind = instruction.op.removesuffix("-start")
    if kind not in KINDS:
        return
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", instruction.text)
    groups = re.search(r"replica_groups=(.*)", instruction.text)
    if pairs:
        group = tuple(sorted({int(number) for number in re.findall(r"\d+", pairs[1])}))
    else:
        group = tuple(int(number) for number in _groups(groups[1] if groups else "")[0])
    if len(group) < 2:
        return
    arrays = [
        _bytes(dtype, bits, shape) for dtype, bits, shape in _ARRAY.findall(instruction.result)
    ]
    # What starts has operands and results in one tuple; an all-reduce by most compilers' versions
    # the results alone.
    operands = len(re.findall(r"%[\w.-]+", instruction.text.partition(")")[0]))
    halved = instruction.op.endswith("-start") and len(arrays) >= 2 * operands
    size = sum(arrays[len(arrays) // 2 :] if halved else arrays)
    if kind == "reduce-scatter":
        size *= len(group)
    readers = [i.op for i in beside if re.search(rf"%{re.escape(instruction.name)}\b", i.text)]
    if kind == "all-reduce" and readers and set(readers) == {"dynamic-slice"}:
        kind = "reduce-scatter"
    yield Collective(kind, size, group, times)


def _bytes(dtype: str, bits: str, shape: str) -> int:
    width = 8 if dtype == "pred" else int(bits)
    return math.ceil(math.prod(int(n) for n in shape.split(",") if n) * width / 8)


def _trips(text: str, computations: dict[str, list[_Instruction]]) -> int:
    """Trips of a loop: as annotated, or the bound that its counter, from 0, is compared with."""
    if known := _TRIPS.search(text):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.-]+)", text)
    lines = computations.get(condition[1], []) if condition else []
    bounds = [_CONSTANT.search(f"{i.result} {i.op}({i.text}") for i in lines]
    found = [int(bound[1]) for bound in bounds if bound]
    return found[0] if len(found) == 1 else 1


def _groups(text: str) -> npt.NDArray[np.int64]:
    """The device groups of a ``replica_groups`` attribute, a group a row."""
    if match := _MESH.match(text):
        axes = {
            name.strip().strip("'"): int(size)
            for name, size in (axis.split("=") for axis in match[1].split(","))
        }
        ids = np.arange(math.prod(axes.values()))
        if match[2]:
            ids = _iota(match[2], match[3])
        # 'name', or 'name':(before)size for a part of an axis.
        chosen = {}
        for name, before, part in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", match[4]):
            chosen[name] = (int(before or 1), int(part or axes[name]))
        shape: list[int] = []
        order: tuple[list[int], list[int]] = ([], [])
        for name, size in axes.items():
            before, part = chosen.get(name, (size, 1))
            shape += [before, part, size // (before * part)]
            order[0].extend([len(shape) - 3, len(shape) - 1])
            order[1].append(len(shape) - 2)
        size = math.prod(part for _, part in chosen.values())
        return ids.reshape(shape).transpose(order[0] + order[1]).reshape(-1, size)
    if match := _IOTA.match(text):
        return _iota(match[2], match[3]).reshape(_numbers(match[1]))
    listed = re.match(r"\{\{(.*?)\}", text)
    return np.array([_numbers(listed[1]) if listed else [0]])


def _iota(shape: str, order: str | None) -> npt.NDArray[np.int64]:
    sizes = _numbers(shape)
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose(_numbers(order)) if order else ids


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number.strip()]
