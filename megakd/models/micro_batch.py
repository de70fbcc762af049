"""One micro-batch on the device, and which of its rows the loss will see.

Legend: B samples, S sequence, T supervised tokens of the micro-batch.
"""

import dataclasses
import functools

import torch
from torch import Tensor

from megakd.kernels.vocab import MASKED


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """Token ids and their labels.

    Attributes:
        ids_BS: int64.
        labels_BS: int64, the token after each; -100 where nothing is to be learnt.
    """

    ids_BS: Tensor
    labels_BS: Tensor

    @functools.cached_property
    def rows_T(self) -> Tensor:
        """Supervised rows s * B + b of hidden states [S, B, H], ascending."""
        return (self.labels_BS.T.flatten() != MASKED).nonzero()[:, 0]

    @functools.cached_property
    def labels_T(self) -> Tensor:
        return self.labels_BS.T.flatten()[self.rows_T]

    @functools.cached_property
    def position_ids_BS(self) -> Tensor:
        batch, length = self.ids_BS.shape
        return torch.arange(length, device=self.ids_BS.device).expand(batch, length)

    def to(self, device) -> "MicroBatch":
        return MicroBatch(self.ids_BS.to(device), self.labels_BS.to(device))


def forward(gpt, micro_batch: MicroBatch) -> Tensor:
    """Hidden states [S, B, H] on the last stage, the next stage's input on the others."""
    return gpt(micro_batch.ids_BS, micro_batch.position_ids_BS, None)
