"""The few numbers per token and rank that make up the loss, and their merge over the ranks.

Sizes: T tokens, K entries per token, R ranks, L lanes. Logits x are raw; z = x / temperature. S is the set of entries.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megakd.kernels import paths
from megakd.kernels.rows import Statistics, finite


class Merged(NamedTuple):
    """The student's and teacher's numbers per token over the whole vocabulary; float64, identical on every rank.

    Everything is relative to a maximum, so that logits of 1e4 lose no digits and one of 250 above the rest no tail.
    """

    outside_max_T: Tensor  # raw logit; 0 where nothing lies outside S
    outside_sum_T: Tensor  # sum outside S of exp(z - outside_max / temperature)
    entry_max_T: Tensor  # raw logit; 0 where S is empty
    entry_sum_T: Tensor
    cross_T: Tensor  # sum in S of P (log P - (z - entry max)); without the log P of sampled targets
    drift_T: Tensor  # sum in S of exp(z - entry max) ((z - entry max) - log P)
    teacher_mass_T: Tensor  # sum in S of P
    lse_above_entry_max_T: Tensor  # log-sum-exp of z over the vocabulary, minus entry max / temperature
    log_student_mass_T: Tensor  # log of the sum in S of Q
    log_student_tail_T: Tensor  # log of the sum outside S of Q
    ce_T: Tensor  # at temperature 1
    lse_at_one_T: Tensor  # log-sum-exp of the raw logits


def build_record(stats: Statistics, logprobs_TK: Tensor, temperature: float, *, sampled: bool = False) -> Tensor:
    """This rank's record [T, L], float32: 8 lanes at temperature 1, and 10 (40 bytes) otherwise.

    Lanes: max outside S; sum outside S of exp(z - max); max in S; sum in S of exp(z - max); sum in S of
    P (log P - (z - max)); sum in S of exp(z - max) ((z - max) - log P); sum in S of P; label logit or -inf; and the
    two sums of exp at temperature 1. The maxima are raw logits. There are two of them, because one entry 104 nats
    above the rest would make the tail underflow under a common maximum.

    Args:
        stats: this rank's read of the student's logits.
        logprobs_TK: of the entries on this rank; -inf in every other slot.
        sampled: leave log P out of the cross term (the exact entropy is known).
    """
    if fused := paths.fused(logprobs_TK, "megakd.kernels.triton.records"):
        return fused.build_record(stats, logprobs_TK, temperature, sampled=sampled)
    x_TK = stats.entry_logits_TK
    max_T = x_TK.amax(1) if x_TK.shape[1] else torch.full_like(stats.max_T, -torch.inf)
    gap_TK = x_TK - finite(max_T)[:, None]
    above_TK = gap_TK / temperature
    e_TK, p_TK = above_TK.exp(), logprobs_TK.exp()
    cross_TK = p_TK * ((0 if sampled else logprobs_TK) - above_TK)
    drift_TK = e_TK * (above_TK - logprobs_TK)
    lanes = [
        stats.max_T,
        stats.sum_T,
        max_T,
        e_TK.sum(1),
        cross_TK.where(p_TK > 0, 0).sum(1),
        drift_TK.where(e_TK > 0, 0).sum(1),
        p_TK.sum(1),
        stats.label_logit_T,
    ]
    if temperature != 1:
        lanes += [stats.sum_at_one_T, gap_TK.exp().sum(1)]
    return torch.stack(lanes, 1)


def merge_records(records_RTL: Tensor, temperature: float) -> Merged:
    """The records of all ranks, in rank order, as one.

    A rank with nothing in a lane has max -inf and zeros there; no -inf is ever subtracted from another.
    """
    lanes = records_RTL.double().unbind(2)
    outside_max_RT, outside_sum_RT, entry_max_RT, entry_sum_RT, cross_RT, drift_RT, mass_RT, label_RT = lanes[:8]
    outside_at_one_RT, entry_at_one_RT = lanes[8:] if temperature != 1 else (outside_sum_RT, entry_sum_RT)

    outside_max_T, entry_max_T = outside_max_RT.amax(0), entry_max_RT.amax(0)
    top_T = finite(torch.maximum(outside_max_T, entry_max_T))
    outside_gap_RT = outside_max_RT - finite(outside_max_T)
    entry_gap_RT = entry_max_RT - finite(entry_max_T)
    outside_sum_T = _scaled(outside_sum_RT, outside_gap_RT / temperature)
    entry_sum_T = _scaled(entry_sum_RT, entry_gap_RT / temperature)
    z_gap_RT = finite(entry_gap_RT / temperature)

    # Log-masses relative to the top of both sets, so that neither is lost beside the other.
    outside_T = outside_sum_T.log() + (outside_max_T - top_T) / temperature
    entry_T = entry_sum_T.log() + (entry_max_T - top_T) / temperature
    lse_T = torch.logaddexp(outside_T, entry_T)
    outside_at_one_T = _scaled(outside_at_one_RT, outside_gap_RT).log() + (outside_max_T - top_T)
    entry_at_one_T = _scaled(entry_at_one_RT, entry_gap_RT).log() + (entry_max_T - top_T)
    lse_at_one_T = torch.logaddexp(outside_at_one_T, entry_at_one_T)
    return Merged(
        outside_max_T=finite(outside_max_T),
        outside_sum_T=outside_sum_T,
        entry_max_T=finite(entry_max_T),
        entry_sum_T=entry_sum_T,
        cross_T=(cross_RT - mass_RT * z_gap_RT).sum(0),
        drift_T=_scaled(drift_RT + entry_sum_RT * z_gap_RT, entry_gap_RT / temperature),
        teacher_mass_T=mass_RT.sum(0),
        lse_above_entry_max_T=lse_T + (top_T - finite(entry_max_T)) / temperature,
        log_student_mass_T=entry_T - lse_T,
        log_student_tail_T=outside_T - lse_T,
        ce_T=lse_at_one_T - (label_RT.amax(0) - top_T),
        lse_at_one_T=top_T + lse_at_one_T,
    )


def _scaled(x_RT: Tensor, gap_RT: Tensor) -> Tensor:
    return (x_RT * gap_RT.exp()).sum(0)
