"""Which positions of a sequence a context parallel rank has: two chunks of 2 x cp, one from each end, as Megatron cuts.

Under a causal mask early positions are cheap and late ones dear; so every rank has as much to do as every other.

Legend: S sequence.
"""

import torch
from torch import Tensor


def own_chunks(rank: int, ranks: int) -> tuple[int, int]:
    """Numbers of this rank's chunks, ascending."""
    return rank, 2 * ranks - 1 - rank


def own_positions(length: int, rank: int, ranks: int, device=None) -> Tensor:
    """int64 [length / ranks], ascending."""
    assert length % (2 * ranks) == 0, f"{length} positions do not divide into {2 * ranks} chunks"
    chunk = length // (2 * ranks)
    return torch.cat([torch.arange(n * chunk, (n + 1) * chunk, device=device) for n in own_chunks(rank, ranks)])


def in_order(parts_S: Tensor, ranks: int) -> Tensor:
    """What the ranks have, one after the other along the first axis, in the order of positions."""
    numbers = [n for rank in range(ranks) for n in own_chunks(rank, ranks)]
    chunks = parts_S.chunk(2 * ranks)
    return torch.cat([chunks[numbers.index(n)] for n in range(2 * ranks)])
