"""Batches: windows of tokens, shuffled, each batch a pure function of the seed and the step."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import grain
import numpy as np
import numpy.typing as npt


class Tokens:
    """Token ids in one or more arrays, read as if they were one."""

    def __init__(self, parts: Sequence[npt.NDArray[np.unsignedinteger]]) -> None:
        """Joins `parts`: 1-D arrays of one dtype, which may be memory-mapped; none is copied."""
        self._parts = list(parts)
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        """Returns the number of tokens."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, wanted: slice) -> npt.NDArray[np.unsignedinteger]:
        """Returns the ids of a slice with step 1.

        Raises:
            ValueError: The slice has another step.
        """
        begin, end, step = wanted.indices(len(self))
        if step != 1:
            raise ValueError(f"a slice of Tokens has step 1, not {step}")
        pieces = [np.empty(0, np.uint16)] if begin >= end else []
        part = bisect_right(self._ends, begin)
        while begin < end:
            start = self._ends[part] - len(self._parts[part])
            stop = min(end, self._ends[part])
            pieces.append(self._parts[part][begin - start : stop - start])
            begin, part = stop, part + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


class TokenWindows:
    """Sequences of `seq_len` + 1 tokens, each beginning with the last token of the one before.

    A tail shorter than a sequence is left out. Random access, as grain wants of a source.
    """

    def __init__(self, tokens: Tokens | npt.NDArray[np.integer], seq_len: int) -> None:
        """Cuts 1-D ids into windows that predict `seq_len` tokens each."""
        self._tokens = tokens
        self._seq_len = seq_len

    def __len__(self) -> int:
        """Returns the number of windows."""
        return max(0, len(self._tokens) - 1) // self._seq_len

    def __getitem__(self, index: int) -> npt.NDArray[np.int32]:
        """Returns window `index`, int32 [seq_len + 1].

        Raises:
            IndexError: There is no such window.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        begin = index * self._seq_len
        return self._tokens[begin : begin + self._seq_len + 1].astype(np.int32)


def batches(
    tokens: Tokens | npt.NDArray[np.integer],
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
) -> Iterator[npt.NDArray[np.int32]]:
    """Yields training batches for ever, from `start_step` on, without reading those before.

    Each epoch holds every window once, in an order of its own; the windows left over after the
    epoch's last full batch are passed over.

    Args:
        tokens: 1-D ids, at least `batch_size` windows of them.
        seq_len: Tokens that a window predicts.
        batch_size: Windows in a batch.
        seed: Decides the order, together with the epoch. 0 to 2**32 - 1.
        start_step: Number of the first batch.
        rows: Which rows of each batch are wanted, the others not being read; None is all of them.

    Yields:
        int32 [batch_size, seq_len + 1], or as many rows as are wanted; a pure function of the
        arguments and the step.

    Raises:
        ValueError: There is less than one batch.
    """
    dataset = _shuffled(tokens, seq_len, batch_size, seed, rows)
    # The trainer waits for one batch a step, and two threads keep that ahead of any model.
    ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    return iter(dataset[start_step:].to_iter_dataset(ahead))


def eval_batches(
    tokens: Tokens | npt.NDArray[np.integer],
    *,
    seq_len: int,
    batch_size: int,
    max_batches: int,
    rows: Sequence[int] | None = None,
) -> Iterator[npt.NDArray[np.int32]]:
    """Yields the first windows in order: the same batches at each evaluation.

    Args:
        tokens: 1-D ids.
        seq_len: Tokens that a window predicts.
        batch_size: Windows in a batch.
        max_batches: Most batches.
        rows: Which rows of each batch are wanted; None is all of them.

    Yields:
        int32 [batch_size, seq_len + 1], at most `max_batches` of them, all full, so that one
        compiled step serves all. Where there are fewer windows than `batch_size`, one batch
        of as many as there are.
    """
    windows = TokenWindows(tokens, seq_len)
    count = eval_rows(len(windows), batch_size)
    wanted = range(count) if rows is None else rows
    for batch in range(min(max_batches, len(windows) // max(count, 1))):
        yield np.stack([windows[batch * count + row] for row in wanted])


def eval_rows(windows: int, batch_size: int, multiple: int = 1) -> int:
    """Rows of an evaluation's batch: `batch_size`, or the largest `multiple` that windows fill."""
    return min(batch_size, windows // multiple * multiple)


def _shuffled(
    tokens: Tokens | npt.NDArray[np.integer],
    seq_len: int,
    batch_size: int,
    seed: int,
    rows: Sequence[int] | None = None,
) -> Any:
    windows = TokenWindows(tokens, seq_len)
    if len(windows) < batch_size:
        raise ValueError(f"{len(windows)} windows do not fill a batch of {batch_size}")
    wanted = list(range(batch_size) if rows is None else rows)

    def read(numbers: npt.NDArray[np.integer]) -> npt.NDArray[np.int32]:
        return np.stack([windows[int(number)] for number in numbers[wanted]])

    # Numbers of windows are shuffled and batched, and those windows read that are wanted.
    # seed() hashes what it is given. shuffle(seed) would not, and adds the epoch to it: epoch 1
    # of seed 0 would be epoch 0 of seed 1. Batching before repeating keeps epochs apart.
    return (
        grain.MapDataset.source(range(len(windows)))
        .seed(seed)
        .shuffle()
        .batch(batch_size, drop_remainder=True)
        .repeat()
        .map(read)
    )
