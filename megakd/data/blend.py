"""Several datasets in fixed proportions."""

from collections.abc import Sequence

import numpy as np

from megakd.data.order import permute

_PERIOD = 1 << 14


class BlendedDataset:
    """Datasets mixed by weight: of the first n samples, n * weight come from each (to less than one sample, and one in
    16,384), however far apart their sizes are. A dataset that is used up begins again, in another order.

    An epoch has as many samples as the parts hold together, or, without weights, is exactly all of their samples.

    Args:
        parts: datasets of one sequence_length.
        weights: positive, one each; None: one after the other, in proportion to their sizes.
        seed: selects the orders of the parts.

    Attributes:
        counts: the sums of the parts' counts.
    """

    def __init__(self, parts: Sequence, weights: Sequence[float] | None, seed: int):
        self.parts = list(parts)
        self.sequence_length = self.parts[0].sequence_length
        self._seed = seed
        self._sizes = [len(part) for part in self.parts]
        self._table = None if weights is None else _blend_table(np.asarray(weights, float))
        names = {name for part in self.parts for name in part.counts}
        self.counts = {name: sum(part.counts.get(name, 0) for part in self.parts) for name in sorted(names)}

    def __len__(self) -> int:
        return sum(self._sizes)

    def locate(self, epoch: int, index: int) -> tuple[int, int, int]:
        """(part, epoch of the part, index in the part) of a sample."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        if self._table is None:
            ends = np.cumsum(self._sizes)
            part = int(np.searchsorted(ends, index, side="right"))
            return part, epoch, index - int(ends[part] - self._sizes[part])
        parts, before, totals = self._table
        period, place = divmod(epoch * len(self) + index, len(parts))
        part = int(parts[place])
        draw = period * int(totals[part]) + int(before[place])
        own_epoch, position = divmod(draw, self._sizes[part])
        return part, own_epoch, int(permute(position, self._sizes[part], self._seed, own_epoch, 3, part)[0])

    def length(self, epoch: int, index: int) -> int:
        """Ids of one sample."""
        part, own_epoch, own_index = self.locate(epoch, index)
        return self.parts[part].length(own_epoch, own_index)

    def sample(self, epoch: int, index: int) -> dict:
        """One sample, as its part gives it."""
        part, own_epoch, own_index = self.locate(epoch, index)
        return self.parts[part].sample(own_epoch, own_index)


def _blend_table(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One period of the mixture: the part of each place, how often it occurred before, how often in all.

    The part furthest behind its share is next, as in Megatron's blends.
    """
    share = weights / weights.sum()
    taken = np.zeros(len(weights), np.int64)
    parts, before = np.empty(_PERIOD, np.int32), np.empty(_PERIOD, np.int64)
    for place in range(_PERIOD):
        part = int(np.argmax(share * (place + 1) - taken))
        parts[place], before[place] = part, taken[part]
        taken[part] += 1
    return parts, before, taken
