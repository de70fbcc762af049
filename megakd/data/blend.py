"""Several datasets in fixed proportions."""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from megakd.data.order import batch_indices, permute
from megakd.errors import DataError

_MOST = 1 << 16  # places of one period of a mixture


class BlendedDataset:
    """Datasets mixed by weight: of the first n samples, n * weight come from each, to less than one sample.

    That holds at every n, however far apart the sizes are, for the samples as they are read (`indices_of_step`): a
    weighted blend is not shuffled as a whole, its parts are. A dataset that is used up begins again, in another order.
    Weights are taken as fractions; where they have no common denominator up to 65,536, the nearest that have are kept
    to.

    An epoch has as many samples as the parts hold together, or, without weights, is exactly all of their samples.

    Args:
        parts: datasets of one sequence_length.
        weights: positive, one each; None: one after the other, in proportion to their sizes.
        seed: selects the orders of the parts.
        by_tokens: the weights are shares of the ids, not of the samples; a part's samples count at their mean length.

    Attributes:
        weighted: whether there are weights.
        counts: the sums of the parts' counts.

    Raises:
        DataError: a weight is so small that its part would never be read.
    """

    def __init__(self, parts: Sequence, weights: Sequence[float] | None, seed: int, *, by_tokens: bool = False):
        self.parts = list(parts)
        self.sequence_length = self.parts[0].sequence_length
        self.weighted = weights is not None
        self._seed = seed
        self._sizes = [len(part) for part in self.parts]
        names = {name for part in self.parts for name in part.counts}
        self.counts = {name: sum(part.counts.get(name, 0) for part in self.parts) for name in sorted(names)}
        if weights is not None:
            if by_tokens:
                weights = [weight / part.mean_length for weight, part in zip(weights, self.parts, strict=True)]
            self._table = _period(_counts(weights))

    def __len__(self) -> int:
        return sum(self._sizes)

    def locate(self, epoch: int, index: int) -> tuple[int, int, int]:
        """(part, epoch of the part, index in the part) of a sample."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        if not self.weighted:
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


def indices_of_step(data, seed: int, step: int, global_batch_size: int) -> list[tuple[int, int]]:
    """`batch_indices` of a data set; a weighted blend is read in its own order, which keeps its proportions."""
    in_order = isinstance(data, BlendedDataset) and data.weighted
    return batch_indices(seed, step, global_batch_size, len(data), in_order=in_order)


def _counts(weights: Sequence[float]) -> list[int]:
    """How often each part occurs in one period."""
    exact = [Fraction(weight).limit_denominator(10**6) for weight in weights]
    shares = [weight / sum(exact) for weight in exact] if all(exact) else [Fraction(0)]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= _MOST and all(shares):
        return [int(share * period) for share in shares]
    wanted = np.asarray(weights, float) / sum(weights) * _MOST
    counts = np.floor(wanted).astype(int)
    counts[np.argsort(counts - wanted, kind="stable")[: _MOST - counts.sum()]] += 1
    if not counts.all():
        raise DataError(
            f"of a blend with the weights {', '.join(f'{weight:.3g}' for weight in weights)}, part "
            f"{int(np.argmin(counts)) + 1} would be less than one sample in {_MOST:,}",
            hint="weigh it more in data.train, or leave it out",
        )
    return counts.tolist()


def _period(counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One period of the mixture: the part of each place, how often it occurred before, how often in all.

    A part that occurs c times in P places has its j-th turn (j = 0, 1, ...) not before place floor(jP/c) and before
    ceil((j+1)P/c), which keeps it within one sample of its share; of those that may, the one that has the least time
    left is next. That none ever misses its turn is the theorem about proportionate schedules on one processor
    (Tijdeman, 1980; Baruah et al., 1996).
    """
    size = sum(counts)
    taken = [0] * len(counts)
    parts, before = np.empty(size, np.int32), np.empty(size, np.int64)
    for place in range(size):
        part = min(
            (number for number, count in enumerate(counts) if taken[number] * size < (place + 1) * count),
            key=lambda number: (-(-(taken[number] + 1) * size // counts[number]), number),
        )
        parts[place], before[place] = part, taken[part]
        taken[part] += 1
    return parts, before, np.asarray(taken)
