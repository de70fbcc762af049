"""An output layer and what is asked of it, whoever's it is: a model's that runs, or a recorded teacher's.

Legend: T tokens, H hidden, W this rank's vocabulary columns.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megakd.kernels import VocabShard
from megakd.kernels.paths import softcap_passes


class OutputLayer:
    """Attributes, which a class of it has:

    shard: this rank's columns.
    head_weight: [W, H], padded columns included (the kernels leave those out).
    softcap: of the logits, None without.
    """

    shard: VocabShard
    head_weight: Tensor
    softcap: float | None

    def logits_of(self, hidden_TH: Tensor) -> Tensor:
        """[T, W]: this rank's columns of the logits of what its `head_input` gives."""
        logits_TW = F.linear(hidden_TH, self.head_weight)
        if self.softcap is None:
            return logits_TW
        if torch.is_grad_enabled():
            return self.softcap * torch.tanh(logits_TW / self.softcap)
        softcap_passes(logits_TW).cap(logits_TW, self.softcap, logits_TW)
        return logits_TW

    def block_tokens(self, budget_bytes: int) -> int:
        """Tokens whose logits on this rank fit into a number of bytes; at least 1."""
        return max(budget_bytes // ((self.shard.stop - self.shard.start) * self.logit_bytes), 1)

    @property
    def logit_bytes(self) -> int:
        """Of one logit."""
        return self.head_weight.dtype.itemsize

    @property
    def state_bytes(self) -> int:
        """Of what it is given of a token."""
        return self.head_weight.shape[1] * self.head_weight.dtype.itemsize
