"""What a model would say: its most likely id and that id's and the label's probability, over a split vocabulary.

Legend: T tokens, W this rank's vocabulary columns. No gradient; for metrics, truth checks and calibration.
"""

import dataclasses

import torch
from torch import Tensor

from megakd.kernels.vocab import VocabShard

ROWS_BYTES = 64 << 20  # of fp32 working set in one block of rows


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
    width = shard.real_width
    record_4T = torch.full((4, len(logits_TW)), -torch.inf, dtype=torch.float64, device=logits_TW.device)
    record_4T[1:3] = 0
    label_column_T = shard.columns(labels_T)
    block = max(ROWS_BYTES // (4 * max(width, 1)), 1)
    for start in range(0, len(logits_TW) if width else 0, block):
        rows = slice(start, start + block)
        block_TW = logits_TW[rows, :width].float()
        max_T = block_TW.amax(-1)
        column_T = (block_TW == max_T[:, None]).int().argmax(-1)  # max promises no order among equals
        label_T = block_TW.gather(1, label_column_T[rows].clamp(min=0)[:, None])[:, 0]
        record_4T[0, rows] = max_T.double()
        record_4T[1, rows] = (column_T + shard.start).double()
        record_4T[2, rows] = (block_TW - max_T[:, None]).exp_().sum(-1).double()
        record_4T[3, rows] = label_T.double().where(label_column_T[rows] >= 0, -torch.inf)
    return merge_predictions(shard.all_gather(record_4T), labels_T)


def merge_predictions(records_R4T: Tensor, labels_T: Tensor) -> Predictions:
    """The ranks' (max, its id, sum of e^(z - max), label logit) as one prediction."""
    max_RT, id_RT, sum_RT, label_RT = records_R4T.unbind(1)
    max_T = max_RT.amax(0)
    rank_T = (max_RT == max_T).int().argmax(0)
    total_T = (sum_RT * (max_RT - max_T).exp()).sum(0)
    label_logit_T = label_RT.amax(0)
    return Predictions(
        id_T=id_RT.gather(0, rank_T[None])[0].long(),
        logprob_T=-total_T.log().float(),
        label_logprob_T=(label_logit_T - max_T - total_T.log()).where(labels_T >= 0, 0.0).float(),
    )
