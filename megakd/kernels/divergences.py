"""Divergences of the teacher P and the student Q over the K entries and the tail, and their gradients.

Sizes: T tokens, K entries per token. S is the set of entries; p and q are P and Q as a `tail` rule compares them.
With u_i = dD/dlog q_i for the entries and u_tail for the tail, and U their sum,

    dD/dz_j = u_j - U q_j                            for j in S
    dD/dz_j = (u_tail - U q_tail) Q_j / Q_tail       for every other column

where Q_j / Q_tail = exp(z_j - log-sum-exp outside S) is never formed as a quotient of two underflowed numbers. A
constant times q may be added to u: it leaves the gradient as it is.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megakd.kernels.records import Merged

TAILS = {
    "forward_kl": ("bucket", "renormalize", "renormalize_teacher", "drop"),
    "reverse_kl": ("bucket", "renormalize"),
}


class Compared(NamedTuple):
    """What a tail rule makes of both models: log p = log P - p_shift and log q = (z - entry max) - q_shift; float64."""

    p_shift_T: Tensor
    q_shift_T: Tensor
    p_mass_T: Tensor  # sum in S of p
    log_p_tail_T: Tensor
    log_q_tail_T: Tensor
    has_entries_T: Tensor


class Gradient(NamedTuple):
    """dD/dz: the values at the entries, float32, and the factor of Q_j / Q_tail at every other column, float64."""

    entries_TK: Tensor
    outside_T: Tensor


def check_divergence(divergence: str, tail: str) -> None:
    """Raises ValueError for an unknown divergence or tail, and for a pair that has no meaning or no minimum."""
    if divergence not in TAILS:
        raise ValueError(f"divergence must be one of {', '.join(TAILS)}, not {divergence!r}")
    if tail not in TAILS[divergence]:
        raise ValueError(f"tail must be one of {', '.join(TAILS[divergence])} with {divergence}, not {tail!r}")


def compare(merged: Merged, log_tail_T: Tensor, tail: str) -> Compared:
    """Applies a tail rule: `bucket` keeps both tails, the others no teacher's, `renormalize` no student's either."""
    mass_T, nothing_T = merged.teacher_mass_T, torch.full_like(merged.teacher_mass_T, -torch.inf)
    has_entries_T = mass_T > 0
    rescaled = tail in ("renormalize", "renormalize_teacher")
    entry_lse_T = merged.entry_sum_T.log()
    return Compared(
        p_shift_T=mass_T.log().where(has_entries_T, 0) if rescaled else torch.zeros_like(mass_T),
        q_shift_T=entry_lse_T.where(has_entries_T, 0) if tail == "renormalize" else merged.lse_above_entry_max_T,
        p_mass_T=has_entries_T.double() if rescaled else mass_T,
        log_p_tail_T=log_tail_T.double() if tail == "bucket" else nothing_T,
        log_q_tail_T=nothing_T if tail == "renormalize" else merged.log_student_tail_T,
        has_entries_T=has_entries_T,
    )


def value(divergence: str, c: Compared, merged: Merged) -> Tensor:
    """D in nats, [T], float64."""
    return {"forward_kl": forward_kl_value, "reverse_kl": reverse_kl_value}[divergence](c, merged)


def gradient(divergence: str, c: Compared, merged: Merged, logprobs_TK: Tensor, above_TK: Tensor) -> Gradient:
    """dD/dz of this rank's columns.

    Args:
        logprobs_TK: of the teacher, -inf in empty slots; above_TK: z of the entries minus their maximum; float32.
    """
    log_p_TK = logprobs_TK - c.p_shift_T[:, None].float()
    log_q_TK = above_TK - c.q_shift_T[:, None].float()
    form = {"forward_kl": forward_kl_u, "reverse_kl": reverse_kl_u}[divergence]
    u_TK, u_tail_T, total_T = form(c, merged, log_p_TK, log_q_TK)
    entries_TK = u_TK - total_T[:, None].float() * log_q_TK.exp()
    return Gradient(entries_TK.where(logprobs_TK > -torch.inf, 0), u_tail_T - total_T * c.log_q_tail_T.exp())


def forward_kl_value(c: Compared, merged: Merged) -> Tensor:
    """KL(p || q) = sum of p (log p - log q)."""
    scale_T = c.p_shift_T.neg().exp()
    entries_T = scale_T * (merged.cross_T + merged.teacher_mass_T * (c.q_shift_T - c.p_shift_T))
    return entries_T.where(c.has_entries_T, 0) + _weighted(c.log_p_tail_T, c.log_p_tail_T - c.log_q_tail_T)


def forward_kl_u(c: Compared, merged: Merged, log_p_TK: Tensor, log_q_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u = -p."""
    p_tail_T = c.log_p_tail_T.exp()
    return -log_p_TK.exp(), -p_tail_T, -(c.p_mass_T + p_tail_T)


def reverse_kl_value(c: Compared, merged: Merged) -> Tensor:
    """KL(q || p) = sum of q (log q - log p)."""
    entries_T = c.q_shift_T.neg().exp() * (merged.drift_T + merged.entry_sum_T * (c.p_shift_T - c.q_shift_T))
    return entries_T.where(c.has_entries_T, 0) + _weighted(c.log_q_tail_T, c.log_q_tail_T - c.log_p_tail_T)


def reverse_kl_u(c: Compared, merged: Merged, log_p_TK: Tensor, log_q_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u = q (log q - log p), less the q that leaves the gradient as it is; its sum is D."""
    tail_T = _weighted(c.log_q_tail_T, c.log_q_tail_T - c.log_p_tail_T)
    return _weighted(log_q_TK, log_q_TK - log_p_TK), tail_T, reverse_kl_value(c, merged)


def _weighted(log_weight: Tensor, x: Tensor) -> Tensor:
    """exp(log_weight) * x, and 0 where the weight is 0, whatever x is."""
    return (log_weight.exp() * x).where(log_weight > -torch.inf, 0)
