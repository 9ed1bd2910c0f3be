"""The order in which contenders are timed."""

import itertools

import pytest

from benchmarks.timing import turns


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 8])
def test_every_round_has_every_side_and_none_follows_another_too_often(count):
    rounds = turns(count, count)
    assert all(sorted(order) == list(range(count)) for order in rounds)
    pairs = [pair for order in rounds for pair in itertools.pairwise(order)]
    most = max((pairs.count(pair) for pair in pairs), default=0)
    assert most <= (1 if count % 2 == 0 else 2)


def test_more_rounds_than_sides_begin_again():
    assert turns(3, 4)[3] == turns(3, 1)[0]
