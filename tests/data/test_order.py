"""Sample order: a bijection in every epoch, a pure function of the step, the same for every layout."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd.data.order import batch_indices, permute, split_batch, validation_indices


@settings(max_examples=200, deadline=None)
@given(size=st.integers(1, 700), seed=st.integers(0, 2**63), epoch=st.integers(0, 99))
def test_permute_is_a_bijection(size, seed, epoch):
    assert sorted(permute(np.arange(size), size, seed, epoch).tolist()) == list(range(size))


def test_permute_is_fixed_for_ever():
    """Golden values: a resumed run must see the order it began with, whatever is upgraded in between."""
    assert permute(np.arange(11), 11, 1234, 0).tolist() == [8, 6, 3, 5, 2, 1, 10, 9, 0, 4, 7]
    assert permute([0, 10**12 - 1], 10**12, 7).tolist() == [278254455647, 226925800551]


def test_positions_outside_are_refused():
    with pytest.raises(ValueError, match=r"\[0, 5\), got 5"):
        permute([5], 5, 1)


def test_orders_look_random():
    """Each place is taken by each value about equally often over seeds: chi-square of 7 x 7 cells over 7,000 seeds."""
    counts = np.zeros((7, 7))
    for seed in range(7000):
        counts[np.arange(7), permute(np.arange(7), 7, seed)] += 1
    assert ((counts - 1000) ** 2 / 1000).sum() < 85  # 36 degrees of freedom: 85 is beyond 1 in 100,000


def test_different_keys_give_different_orders():
    orders = {tuple(permute(np.arange(50), 50, *key)) for key in [(1, 0), (0, 1), (2, 0), (1, 1), (1,), (1, 0, 0)]}
    assert len(orders) == 6


def test_every_epoch_visits_each_sample_once_across_batches():
    """13 samples, batches of 5: epoch 0 is steps 0-2 (and 2 samples of epoch 1), whatever the batch."""
    visited = [pair for step in range(13) for pair in batch_indices(3, step, 5, 13)]
    assert [epoch for epoch, _ in visited] == [0] * 13 + [1] * 13 + [2] * 13 + [3] * 13 + [4] * 13
    for epoch in range(5):
        assert sorted(index for e, index in visited if e == epoch) == list(range(13))
    assert len({tuple(index for e, index in visited if e == epoch) for epoch in range(5)}) == 5


def test_order_does_not_depend_on_the_batch_size():
    by_five = [pair for step in range(12) for pair in batch_indices(9, step, 5, 17)]
    by_twelve = [pair for step in range(5) for pair in batch_indices(9, step, 12, 17)]
    assert by_five == by_twelve


def test_samples_in_their_own_order():
    assert batch_indices(3, 1, 5, 7, in_order=True) == [(0, 5), (0, 6), (1, 0), (1, 1), (1, 2)]


def test_a_batch_may_hold_several_epochs():
    batch = batch_indices(1, 0, 7, 2)
    assert [epoch for epoch, _ in batch] == [0, 0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("dp", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_every_layout_trains_on_the_same_samples_in_the_same_order(dp, micro_batch_size):
    batch = batch_indices(5, 2, 24, 101)
    parts = [split_batch(batch, rank, dp, micro_batch_size) for rank in range(dp)]
    assert all(len(micro_batch) == micro_batch_size for rank in parts for micro_batch in rank)
    assert [pair for rank in parts for micro_batch in rank for pair in micro_batch] == batch


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="6 samples do not divide into 2 ranks x micro-batches of 2"):
        split_batch(batch_indices(1, 0, 6, 9), 0, 2, 2)


def test_validation_is_in_stored_order_and_filled_up():
    assert validation_indices(0, 4, 6) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert validation_indices(1, 4, 6) == [(0, 4), (0, 5), None, None]
