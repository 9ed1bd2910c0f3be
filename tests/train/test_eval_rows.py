"""Which sequences of validation a process has, and how many a batch of them holds."""

import numpy as np
import pytest

from train.batches import eval_batches, eval_rows

TOKENS = np.arange(24 * 4 + 3, dtype=np.uint16)


def test_a_process_has_its_rows_of_every_batch():
    shape = {"seq_len": 4, "batch_size": 6, "max_batches": 9}
    parts = eval_batches(TOKENS, **shape, rows=[1, 4])
    for whole, part in zip(eval_batches(TOKENS, **shape), parts, strict=True):
        np.testing.assert_array_equal(part, whole[[1, 4]])


@pytest.mark.parametrize(
    ("sequences", "batch_size", "multiple", "rows"),
    [(24, 5, 1, 5), (3, 8, 1, 3), (7, 8, 4, 4), (7, 4, 4, 4), (3, 8, 4, 0)],
)
def test_a_batch_holds_what_there_is_in_whole_multiples(sequences, batch_size, multiple, rows):
    assert eval_rows(sequences, batch_size, multiple) == rows
