"""What select_top_k does between the reads of the logits, in plain PyTorch; triton.selection_steps has the same.

    share       from all ranks' largest values: the threshold of a row, and how many of its ties this rank keeps
    normalize   from all ranks' records: log-probabilities of entries and tail, and what the model would say

Sizes: T tokens, K entries per token, R ranks, L values sent by a rank, or lanes of its record.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megakd.kernels.predictions import Predictions


class Normalized(NamedTuple):
    """Log-probabilities of this rank's entries, -inf for none, and the log mass outside everyone's; float32."""

    logprobs_TK: Tensor
    log_tail_T: Tensor
    said: Predictions | None


def share(values_RTL: Tensor, top_k: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The K-th largest value of each row, float32; how many of the logits equal to it this rank is to keep, int64; and
    whether the row is fine: no rank has marked it with NaN.

    A rank's list may be too short for all its ties, but then it holds as many as the row still needs.
    """
    values_TRL = values_RTL.transpose(0, 1)
    threshold_T = values_TRL.flatten(1).topk(top_k, 1, sorted=False).values.amin(1)
    above_TR = (values_TRL > threshold_T[:, None, None]).sum(2)
    equal_TR = (values_TRL == threshold_T[:, None, None]).sum(2)
    missing_T = top_k - above_TR.sum(1) - equal_TR[:, :rank].sum(1)
    fine_T = ~values_RTL.isnan().any(2).any(0)
    return threshold_T.float(), torch.minimum(missing_T, equal_TR[:, rank]).clamp(min=0), fine_T


def normalize(entry_logits_TK: Tensor, records_RTL: Tensor, labels_T: Tensor | None, temperature: float) -> Normalized:
    """See `selection_rows.Chosen` for the lanes of a record; without labels there is no prediction."""
    outside_max_RT, outside_sum_RT, entry_max_RT, entry_sum_RT, *more = records_RTL.double().unbind(2)
    top_T = entry_max_RT.amax(0)  # of all logits: the entries are the largest
    gaps = outside_max_RT - top_T, entry_max_RT - top_T
    log_outside_T, log_all_T = _log_masses(outside_sum_RT, entry_sum_RT, *gaps, temperature)
    logprobs_TK = (entry_logits_TK - top_T[:, None].float()) / temperature - log_all_T[:, None].float()
    said = None
    if labels_T is not None:
        *at_one, best_RT, label_RT = more
        log_all_at_one_T = _log_masses(*at_one, *gaps, 1.0)[1] if at_one else log_all_T
        best_T = best_RT.long().masked_fill(entry_max_RT < top_T, torch.iinfo(torch.int64).max).amin(0)
        label_logprob_T = (label_RT.amax(0) - top_T - log_all_at_one_T).where(labels_T >= 0, 0.0)
        said = Predictions(best_T, -log_all_at_one_T.float(), label_logprob_T.float())
    return Normalized(logprobs_TK, (log_outside_T - log_all_T).float(), said)


def _log_masses(
    outside_RT: Tensor, entry_RT: Tensor, outside_gap_RT: Tensor, entry_gap_RT: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log of the masses outside the entries and of all, relative to the largest logit; float64 [T]."""
    log_outside_T = (outside_RT.log() + outside_gap_RT / temperature).logsumexp(0)
    return log_outside_T, torch.logaddexp(log_outside_T, (entry_RT.log() + entry_gap_RT / temperature).logsumexp(0))
