"""How a cache knows the samples of a run: by their ids, their supervised positions and the last label.

Sizes: S ids of a sample.
"""

from typing import NamedTuple

import numpy as np

from megakd.cache.row import NO_LABEL
from megakd.errors import DataError
from megakd.kernels.vocab import MASKED
from megakd.targets import sample_key


class Sample(NamedTuple):
    """How the cache knows a sample."""

    key: bytes
    mask_S: np.ndarray
    last_label: int


def read_sample(ids_S: np.ndarray, labels_S: np.ndarray) -> Sample:
    """The identity of a sample and its supervised positions.

    Raises:
        DataError: a label is not the next id, so that ids alone would not tell what the teacher was asked.
    """
    mask_S = labels_S != MASKED
    wrong = np.flatnonzero(mask_S[:-1] & (labels_S[:-1] != ids_S[1:]))
    if len(wrong):
        at = int(wrong[0])
        raise DataError(
            f"position {at} of a sample has label {labels_S[at]}, but the next id is {ids_S[at + 1]}; the logit cache "
            f"holds next-token targets only",
            hint="leave teacher.cache out and train online",
        )
    return Sample(sample_key(ids_S), mask_S, int(labels_S[-1]) if mask_S[-1] else NO_LABEL)
