"""Which samples a step trains on: pure functions of (seed, epoch, step), the same for every layout and every resume.

There is no state to save but the step number. Orders are permutations computed by a formula (a Feistel network over the
next power of four, walked until it lands inside), so position i of an epoch is found without drawing the positions
before it, and no library's random number generator is involved.
"""

import numpy as np

_ROUNDS = 6
_MASK = (1 << 64) - 1


def permute(positions, size: int, *key: int) -> np.ndarray:
    """Where each of `positions` goes under the pseudo-random permutation of range(size) that `key` selects.

    Args:
        positions: int, or int64[N] of numbers in [0, size).
        key: whole numbers that select the permutation, such as (seed, epoch).

    Returns:
        int64[N], a bijection of range(size).
    """
    values = np.atleast_1d(np.asarray(positions)).astype(np.uint64)
    if values.size and int(values.max()) >= size:
        raise ValueError(f"positions must be in [0, {size}), got {int(values.max())}")
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = _round_keys(key)
    outside = np.arange(values.size)
    while outside.size:
        values[outside] = _feistel(values[outside], half_bits, keys)
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def _round_keys(key: tuple[int, ...]) -> list[int]:
    state = 0
    for number in key:
        state = _mix_int(state ^ (number & _MASK))
    keys = []
    for _ in range(_ROUNDS):
        state = _mix_int(state)
        keys.append(state)
    return keys


def _mix_int(x: int) -> int:
    """splitmix64: one step of a 64-bit mixing function."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _feistel(values: np.ndarray, half_bits: int, keys: list[int]) -> np.ndarray:
    """One pass of the network over 2 * half_bits bits: a bijection of [0, 4 ** half_bits)."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        x = right + np.uint64(key)  # uint64 arrays wrap around, which is what mixing wants
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        left, right = right, left ^ ((x ^ (x >> np.uint64(31))) & mask)
    return (left << shift) | right


def batch_indices(
    seed: int, step: int, global_batch_size: int, samples_per_epoch: int, *, in_order: bool = False
) -> list[tuple[int, int]]:
    """The samples of one optimizer step, in global order.

    Every epoch visits each sample once, in its own order; batches run on across the end of an epoch.

    Args:
        seed: run.seed.
        step: optimizer steps done before this one (the first step is 0).
        global_batch_size: samples of a step, over all data-parallel ranks.
        samples_per_epoch: len(dataset).
        in_order: every epoch visits the samples in their own order instead.

    Returns:
        `global_batch_size` pairs (epoch, index) for `dataset.sample`.
    """
    first = step * global_batch_size
    epochs, positions = np.divmod(np.arange(first, first + global_batch_size), samples_per_epoch)
    if in_order:
        return [(int(epoch), int(position)) for epoch, position in zip(epochs, positions, strict=True)]
    indices = np.empty_like(positions)
    for epoch in np.unique(epochs):
        rows = epochs == epoch
        indices[rows] = permute(positions[rows], samples_per_epoch, seed, int(epoch), 0)
    return [(int(epoch), int(index)) for epoch, index in zip(epochs, indices, strict=True)]


def validation_indices(step: int, global_batch_size: int, samples: int) -> list[tuple[int, int] | None]:
    """The samples of one validation batch, in stored order; the last batch is filled up with None (see `load_batch`).

    Args:
        step: number of the batch; there are ceil(samples / global_batch_size).
        global_batch_size: entries to return.
        samples: how many to validate on, at most len(dataset).
    """
    first = step * global_batch_size
    return [(0, index) if index < samples else None for index in range(first, first + global_batch_size)]


def split_batch(indices: list, dp_rank: int, dp: int, micro_batch_size: int) -> list[list]:
    """The micro-batches of one data-parallel rank: a contiguous share of the global batch, cut in order.

    Raises:
        ValueError: the batch does not divide by dp * micro_batch_size.
    """
    if len(indices) % (dp * micro_batch_size):
        raise ValueError(f"{len(indices)} samples do not divide into {dp} ranks x micro-batches of {micro_batch_size}")
    share = len(indices) // dp
    mine = indices[dp_rank * share : (dp_rank + 1) * share]
    return [mine[start : start + micro_batch_size] for start in range(0, share, micro_batch_size)]
