"""The vocabulary axis split over ranks: who owns which ids."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

MASKED = -100  # the label of a token that is not supervised


@dataclass(frozen=True)
class VocabShard:
    """The half-open range of token ids whose columns this rank holds.

    Args:
        start, stop: ids of the first column and of the one after the last; stop - start = W, the width of the shard.
        size: the real vocabulary V, the same on every rank. A column whose id is `size` or above is padding: it counts
            as -inf whatever it holds, and gets gradient 0.
        group: the ranks over which the vocabulary is split, in ascending order of their ids; None when this rank
            holds all of it.
    """

    start: int
    stop: int
    size: int
    group: ProcessGroup | None = None

    def __post_init__(self):
        if not 0 <= self.start <= self.stop or self.size < 1:
            raise ValueError(f"a vocabulary shard needs 0 <= start <= stop and size >= 1, not {self}")
        if self.group is None and (self.start > 0 or self.stop < self.size):
            raise ValueError(
                f"without a group the shard must hold all {self.size} ids, not [{self.start}, {self.stop})"
            )

    @property
    def real_width(self) -> int:
        """Number of columns that are not padding; they come first."""
        return max(0, min(self.stop, self.size) - self.start)

    @property
    def ranks(self) -> int:
        """Number of ranks the vocabulary is split over."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """Place of this rank in the group."""
        return 0 if self.group is None else dist.get_rank(self.group)

    def columns(self, ids: Tensor) -> Tensor:
        """This rank's column of each global id, int64; -1 for an id of another rank, of the padding, or below 0."""
        owned = (ids >= self.start) & (ids < self.start + self.real_width)
        return torch.where(owned, ids - self.start, -1)

    def check_logits(self, logits_TW: Tensor, name: str = "logits") -> None:
        """Raises ValueError unless the logits are [T, W] in a floating dtype of at most 32 bits."""
        width = self.stop - self.start
        if logits_TW.dim() != 2 or logits_TW.shape[1] != width:
            raise ValueError(
                f"{name} must be [T, {width}] for ids [{self.start}, {self.stop}), not {list(logits_TW.shape)}"
            )
        if logits_TW.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name} must be float32, bfloat16 or float16, not {logits_TW.dtype}")

    def all_gather(self, mine: Tensor) -> Tensor:
        """What every rank holds, stacked in rank order: [R, ...]. One all-gather; none for a single rank."""
        if self.ranks == 1:
            return mine[None]
        everyone = mine.new_empty((self.ranks, *mine.shape))
        # torch 2.13 renamed it, and warns at every call of the old name
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        all_gather(everyone.flatten(0, 1), mine.contiguous(), group=self.group)
        return everyone

    def sum_over_ranks(self, x_TH: Tensor, *, scatter: bool = False) -> Tensor:
        """The sum over the ranks, [T, H], written over `x_TH`; with `scatter` this rank's part [T / R, H] of it.

        One all-reduce or reduce-scatter; none for a single rank.
        """
        return self.start_sum_over_ranks(x_TH, scatter=scatter)()

    def start_sum_over_ranks(self, x_TH: Tensor, *, scatter: bool = False) -> Callable[[], Tensor]:
        """Starts `sum_over_ranks`, to go on beside what is computed next; calling the result waits, and gives the sum.

        `x_TH` must be left alone until then.
        """
        if self.ranks == 1:
            return lambda: x_TH
        if scatter:
            result = x_TH.new_empty((len(x_TH) // self.ranks, *x_TH.shape[1:]))
            reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
            work = reduce_scatter(result, x_TH.contiguous(), group=self.group, async_op=True)
        else:
            result = x_TH
            work = dist.all_reduce(x_TH, group=self.group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return result

        return wait
