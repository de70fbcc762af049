"""What a model would say: its most likely id and that id's and the label's probability, over a split vocabulary.

One read of the logits (`rows.extremes`), no gradient; for metrics, truth checks and calibration.

Legend: T tokens, W this rank's vocabulary columns.
"""

import dataclasses

import torch
from torch import Tensor

from megakd.kernels.paths import row_passes
from megakd.kernels.vocab import VocabShard


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Per token, float32 nats at temperature 1, equal on every rank.

    Attributes:
        id_T: the most likely id, the lowest one among equals; int64.
        logprob_T: its log-probability.
        label_logprob_T: the label's log-probability; 0 where the label is -100.
    """

    id_T: Tensor
    logprob_T: Tensor
    label_logprob_T: Tensor


@torch.no_grad()
def predict(logits_TW: Tensor, labels_T: Tensor, shard: VocabShard) -> Predictions:
    """Greedy predictions and label log-probabilities.

    Args:
        logits_TW: any float dtype; not modified.
        labels_T: int64 global ids, -100 for none.
        shard: which ids the columns are; columns at or beyond the real vocabulary are left out.
    Collectives: one all-gather of 4 fp64 numbers (32 B) per token and rank.
    """
    max_T, column_T, sum_T, label_logit_T = row_passes(logits_TW).extremes(
        logits_TW, shard.columns(labels_T), shard.real_width
    )
    record_4T = torch.stack([max_T.double(), (column_T + shard.start).double(), sum_T.double(), label_logit_T.double()])
    return merge_predictions(*shard.all_gather(record_4T).unbind(1), labels_T)


def merge_predictions(max_RT: Tensor, id_RT: Tensor, sum_RT: Tensor, label_RT: Tensor, labels_T: Tensor) -> Predictions:
    """The ranks' largest logits, their ids, sums of e^(z - max) and label logits as one prediction; all float64."""
    max_T = max_RT.amax(0)
    rank_T = (max_RT == max_T).int().argmax(0)
    total_T = (sum_RT * (max_RT - max_T).exp()).sum(0)
    label_logit_T = label_RT.amax(0)
    return Predictions(
        id_T=id_RT.gather(0, rank_T[None])[0].long(),
        logprob_T=-total_T.log().float(),
        label_logprob_T=(label_logit_T - max_T - total_T.log()).where(labels_T >= 0, 0.0).float(),
    )
