"""Packing against the definition of best fit, and packed samples against the same samples alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd.data.packing import pack_best_fit


def rooms_left(lengths, capacity):
    """Best fit by its definition: from the longest, each into the sequence whose room is the smallest that suffices."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        enough = [room for room in rooms if room >= length]
        if enough:
            rooms.remove(min(enough))
        rooms.append((min(enough) if enough else capacity) - length)
    return sorted(rooms)


@settings(max_examples=400, deadline=None)
@given(data=st.data(), capacity=st.integers(1, 30), seed=st.integers(0, 5))
def test_best_fit(data, capacity, seed):
    lengths = np.array(data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=60)))
    members, ends = pack_best_fit(lengths, capacity, seed)
    assert sorted(members) == list(range(len(lengths)))
    filled = [lengths[part].sum() for part in np.split(members, ends[:-1])]
    assert sorted(capacity - total for total in filled) == rooms_left(lengths, capacity)


def test_the_seed_chooses_among_equals():
    lengths = np.array([3] * 12 + [1] * 12)
    packs = {
        tuple(tuple(sorted(p)) for p in np.split(m, e[:-1])) for m, e in (pack_best_fit(lengths, 4, s) for s in (1, 2))
    }
    assert len(packs) == 2
    assert pack_best_fit(lengths, 4, 1)[0].tolist() == pack_best_fit(lengths, 4, 1)[0].tolist()


@pytest.mark.parametrize("lengths", [[], [0], [5]])
def test_lengths_that_do_not_fit(lengths):
    with pytest.raises(ValueError, match=r"lengths must be in \[1, 4\]"):
        pack_best_fit(np.array(lengths, int), 4, 1)
