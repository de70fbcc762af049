"""Completions as rows of a batch, beside those of a data set."""

import dataclasses

import numpy as np

from megakd.config import Config
from megakd.data.dataset import IGNORED
from megakd.data.packing import pack_best_fit
from megakd.rollouts.kept import Rollout

ROLLOUTS = "rollouts"  # in the place of an epoch


@dataclasses.dataclass(frozen=True)
class MixedRows:
    """Rows for `megakd.data.dataset.load_batch`: samples of a data set by (epoch, index), and (`rollouts`, number).

    Attributes:
        data: a data set; None where everything is on-policy.
        rows: completions of each row; several where rows are packed.
        sequence_length: most ids of a row.
    """

    data: object | None
    rows: list[list[Rollout]]
    sequence_length: int

    @classmethod
    def of(cls, data, rollouts: list[Rollout], config: Config, step: int) -> "MixedRows":
        """Each completion in a row of its own; or packed, which the step's number seeds.

        Args:
            data: as the attribute.
        """
        length = config.data.sequence_length
        if not config.data.packing:
            return cls(data, [[rollout] for rollout in rollouts], length)
        members, ends = pack_best_fit(np.array([ids_of(rollout) for rollout in rollouts]), length, step)
        rows = np.split(members, ends[:-1])
        return cls(data, [[rollouts[member] for member in row] for row in rows], length)

    def length(self, epoch, index: int) -> int:
        """Ids of a row."""
        if epoch == ROLLOUTS:
            return sum(map(ids_of, self.rows[index]))
        return self.data.length(epoch, index)

    def sample(self, epoch, index: int) -> dict:
        """As of `megakd.data.samples.SampleDataset`: ids, labels and segments of a row."""
        if epoch != ROLLOUTS:
            return self.data.sample(epoch, index)
        parts = [as_sample(rollout) for rollout in self.rows[index]]
        return {
            "ids": np.concatenate([ids for ids, _ in parts]),
            "labels": np.concatenate([labels for _, labels in parts]),
            "segments": [len(ids) for ids, _ in parts],
        }


def ids_of(rollout: Rollout) -> int:
    """How many ids a model reads of it: all but the last."""
    return len(rollout.prompt_ids) + len(rollout.ids) - 1


def as_sample(rollout: Rollout) -> tuple[np.ndarray, np.ndarray]:
    """Ids, and labels where the student wrote; int64."""
    whole = np.array([*rollout.prompt_ids, *rollout.ids], np.int64)
    labels = whole[1:].copy()
    labels[: len(rollout.prompt_ids) - 1] = IGNORED
    return whole[:-1], labels


def global_rows(data: list[tuple], count: int, multiple: int) -> list[tuple | None]:
    """The rows of a global batch: those of data with `count` of rollouts spread evenly among them.

    Args:
        data: (epoch, index) of data's.
        multiple: of rows; filled up with None, where packing has left fewer.
    """
    size = len(data) + count
    rest, rows = iter(data), []
    for place in range(size):
        before, after = place * count // size, (place + 1) * count // size
        rows.append((ROLLOUTS, before) if after > before else next(rest))
    return rows + [None] * (-size % multiple)
