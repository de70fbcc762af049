"""Divergences of the teacher P and the student Q over the K entries and the tail, and their gradients.

Sizes: T tokens, K entries per token. S is the set of entries; p and q are P and Q as a `tail` rule compares them. Every
divergence is a sum over the entries and the tail of some f(p, q). With u = df/dlog q, and U the sum of all u,

    dD/dz_j = u_j - U q_j                            for j in S
    dD/dz_j = (u_tail - U q_tail) Q_j / Q_tail       for every other column

where Q_j / Q_tail = exp(z_j - log-sum-exp outside S) is never formed as a quotient of two underflowed numbers. A
constant times q may be added to u: it leaves the gradient as it is.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megakd.kernels.records import Merged

TAILS = {
    "forward_kl": ("bucket", "renormalize", "renormalize_teacher", "drop"),
    "reverse_kl": ("bucket", "renormalize"),
    "jsd": ("bucket", "renormalize", "renormalize_teacher"),
    "skew_forward_kl": ("bucket", "renormalize"),
    "skew_reverse_kl": ("bucket", "renormalize", "renormalize_teacher"),
}


def check_divergence(divergence: str, tail: str, beta: float = 0.5, skew: float = 0.1) -> None:
    """Raises ValueError for an unknown divergence or tail, a pair that goes wrong, and a weight at its limits."""
    if divergence not in TAILS:
        raise ValueError(f"divergence must be one of {', '.join(TAILS)}, not {divergence!r}")
    if tail not in TAILS[divergence]:
        raise ValueError(f"tail must be one of {', '.join(TAILS[divergence])} with {divergence}, not {tail!r}")
    if divergence == "jsd" and not 0 < beta < 1:
        raise ValueError(f"beta must be between 0 and 1, exclusive, not {beta}")
    if divergence.startswith("skew") and not 0 < skew < 1:
        raise ValueError(f"skew must be between 0 and 1, exclusive, not {skew}")


def forward_kl(log_p: Tensor, log_q: Tensor, _) -> tuple[Tensor, Tensor]:
    """f = p (log p - log q), u = -p: KL(p || q)."""
    return _weighted(log_p, log_p - log_q), -log_p.exp()


def reverse_kl(log_p: Tensor, log_q: Tensor, _) -> tuple[Tensor, Tensor]:
    """f = u = q (log q - log p), the u less q: KL(q || p)."""
    f = _weighted(log_q, log_q - log_p)
    return f, f


def jsd(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q; u = (1 - beta) q (log q - log m)."""
    log_m = _mix(log_p, log_q, beta)
    u = (1 - beta) * _weighted(log_q, log_q - log_m)
    return beta * _weighted(log_p, log_p - log_m) + u, u


def skew_forward_kl(log_p: Tensor, log_q: Tensor, skew: float) -> tuple[Tensor, Tensor]:
    """KL(p || m) with m = skew p + (1 - skew) q; u = -p (1 - skew) q / m."""
    log_m = _mix(log_p, log_q, skew)
    return _weighted(log_p, log_p - log_m), (skew - 1) * _weighted(log_p, (log_q - log_m).exp())


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, skew: float) -> tuple[Tensor, Tensor]:
    """KL(q || m) with m = skew q + (1 - skew) p; u = q (log q - log m - skew q / m), less q."""
    log_m = _mix(log_q, log_p, skew)
    f = _weighted(log_q, log_q - log_m)
    return f, f - skew * _weighted(log_q, (log_q - log_m).exp())


FORMS = {form.__name__: form for form in (forward_kl, reverse_kl, jsd, skew_forward_kl, skew_reverse_kl)}


class Compared(NamedTuple):
    """What a tail rule makes of both models: log p = log P - p_shift and log q = (z - entry max) - q_shift; float64."""

    p_shift_T: Tensor
    q_shift_T: Tensor
    p_mass_T: Tensor  # sum in S of p
    log_p_tail_T: Tensor
    log_q_tail_T: Tensor


class Value(NamedTuple):
    """D in nats, U, and u_tail - U q_tail; float64 [T]."""

    kd_T: Tensor
    u_total_T: Tensor
    outside_T: Tensor


def compare(merged: Merged, log_tail_T: Tensor, tail: str) -> Compared:
    """Applies a tail rule: `bucket` keeps both tails, the others no teacher's, `renormalize` no student's either.

    Where the others find no entries there is nothing to compare: all is 0, and so are D and its gradient.
    """
    mass_T, nothing_T = merged.teacher_mass_T, torch.full_like(merged.teacher_mass_T, -torch.inf)
    some_T = mass_T > 0
    rescaled = tail in ("renormalize", "renormalize_teacher")
    q_tail_T, log_entries_T = merged.log_student_tail_T, merged.entry_sum_T.log()
    if tail != "bucket":
        q_tail_T = nothing_T if tail == "renormalize" else q_tail_T.where(some_T, -torch.inf)
    return Compared(
        p_shift_T=mass_T.log().where(some_T, 0) if rescaled else torch.zeros_like(mass_T),
        q_shift_T=log_entries_T.where(some_T & (merged.entry_sum_T > 0), 0)
        if tail == "renormalize"
        else merged.lse_above_entry_max_T,
        p_mass_T=some_T.double() if rescaled else mass_T,
        log_p_tail_T=log_tail_T.double() if tail == "bucket" else nothing_T,
        log_q_tail_T=q_tail_T,
    )


def entry_logs(c: Compared, logprobs_TK: Tensor, above_TK: Tensor) -> tuple[Tensor, Tensor]:
    """log p and log q of this rank's entries, -inf in empty slots; float32.

    Args:
        logprobs_TK: of the teacher, -inf in empty slots; above_TK: z of the entries minus their maximum.
    """
    log_q_TK = above_TK - c.q_shift_T[:, None].float()
    return logprobs_TK - c.p_shift_T[:, None].float(), log_q_TK.where(logprobs_TK > -torch.inf, -torch.inf)


def mixes(divergence: str) -> bool:
    """Whether P and Q meet inside a logarithm, so that the sums over S need a second look at the entries."""
    return divergence not in ("forward_kl", "reverse_kl")


def entry_sums(divergence: str, log_p_TK: Tensor, log_q_TK: Tensor, parameter: float) -> Tensor:
    """Sums of f and of u over this rank's entries: [T, 2], float32, to be summed over the ranks."""
    return torch.stack([x_TK.sum(1) for x_TK in FORMS[divergence](log_p_TK, log_q_TK, parameter)], 1)


def evaluate(divergence: str, c: Compared, merged: Merged, sums_T2: Tensor | None, parameter: float) -> Value:
    """The divergence of the whole vocabulary; `sums_T2` over all ranks, None unless `mixes(divergence)`."""
    some_T = merged.teacher_mass_T > 0
    if sums_T2 is not None:
        f_T, u_T = sums_T2.unbind(1)
    elif divergence == "forward_kl":
        f_T = c.p_shift_T.neg().exp() * (merged.cross_T + merged.teacher_mass_T * (c.q_shift_T - c.p_shift_T))
        f_T, u_T = f_T.where(some_T, 0), -c.p_mass_T
    else:
        f_T = c.q_shift_T.neg().exp() * (merged.drift_T + merged.entry_sum_T * (c.p_shift_T - c.q_shift_T))
        f_T = u_T = f_T.where(some_T & (merged.entry_sum_T > 0), 0)  # exp(-q_shift) may be infinite where q is 0
    f_tail_T, u_tail_T = FORMS[divergence](c.log_p_tail_T, c.log_q_tail_T, parameter)
    u_total_T = u_T + u_tail_T
    return Value(f_T + f_tail_T, u_total_T, u_tail_T - u_total_T * c.log_q_tail_T.exp())


def _weighted(log_weight: Tensor, x: Tensor) -> Tensor:
    """exp(log_weight) * x, and 0 where the weight is 0, whatever x is."""
    weight = log_weight.exp()
    return (weight * x).where(weight > 0, 0)


def _mix(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """log(weight a + (1 - weight) b)."""
    return torch.logaddexp(log_a + math.log(weight), log_b + math.log1p(-weight))
