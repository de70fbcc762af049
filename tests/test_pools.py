"""The ranks of tests/ranks.py: what a call builds ends with it."""

import os

from tests.ranks import run_ranks
from tests.training import small


def threads(rank, ranks):
    return len(os.listdir("/proc/self/task"))


def test_the_groups_of_a_layout_end_when_it_is_torn_down():
    arguments = (2, 1, 4, 1, {"optimizer__distributed": True})
    run_ranks(2, small.curve, *arguments)
    before = run_ranks(2, threads)
    for _ in range(2):
        run_ranks(2, small.curve, *arguments)
    after = run_ranks(2, threads)
    assert all(now <= then for now, then in zip(after, before, strict=True)), (before, after)
