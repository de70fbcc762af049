"""Best-fit packing: many samples into few sequences of one length."""

import numpy as np

from megakd.data.order import permute


def pack_best_fit(lengths: np.ndarray, capacity: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack samples from the longest to the shortest, each into the fullest sequence that still has room for it.

    Sequences with equal room are interchangeable, so they are kept in one group for each room and moved many at a time:
    the work grows with the number of different (length, room) pairs, not with the number of samples.

    Args:
        lengths: int[N], each in [1, capacity].
        capacity: places of a sequence.
        seed: selects which of the samples of one length goes where.

    Returns:
        members: int64[N], samples in the order of their sequences; ends: int64[P], where each sequence ends in it.
    """
    lengths = np.asarray(lengths, np.int64)
    if lengths.size == 0 or lengths.min() < 1 or lengths.max() > capacity:
        raise ValueError(f"lengths must be in [1, {capacity}], got {np.unique(lengths)}")
    shuffled = permute(np.arange(lengths.size), lengths.size, seed, 2)
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    sequence_of = np.empty(lengths.size, np.int64)
    groups: dict[int, list[np.ndarray]] = {}  # room -> sequences with exactly that room, in parts
    rooms = np.zeros(capacity + 1, bool)  # which rooms have a group
    opened = start = 0
    sizes, counts = np.unique(-lengths[order], return_counts=True)
    for size, count in zip((-sizes).tolist(), counts.tolist(), strict=True):
        waiting = order[start : start + count]
        start += count
        while waiting.size:
            room = size + int(rooms[size:].argmax())
            if not rooms[room]:
                room = capacity
                groups[room] = [np.arange(opened, opened + -(-waiting.size // (capacity // size)))]
                opened += groups[room][0].size
            sequences = np.concatenate(groups.pop(room))
            rooms[room] = False
            most = room // size  # a sequence that got one is the fullest with room now, so it gets the next one too
            full = min(sequences.size, waiting.size // most)
            takes = [(sequences[:full], most)]
            if full < sequences.size:
                takes.append((sequences[full : full + 1], waiting.size - full * most))
                takes.append((sequences[full + 1 :], 0))
            for taking, each in takes:
                if taking.size:
                    taken = taking.size * each
                    sequence_of[waiting[:taken]] = np.repeat(taking, each)
                    waiting = waiting[taken:]
                    groups.setdefault(room - each * size, []).append(taking)
                    rooms[room - each * size] = True
    by_sequence = np.argsort(sequence_of, kind="stable")
    return by_sequence, np.cumsum(np.bincount(sequence_of, minlength=opened))
