"""Divergences of the teacher P and the student Q over the K entries and the tail, and their gradients.

Sizes: T tokens, K entries per token. S is the set of entries; p and q are P and Q as a `tail` rule compares them. Every
divergence is a sum over the entries and the tail of some f(p, q). With u = df/dlog q, and U the sum of all u,

    dD/dz_j = u_j - U q_j                            for j in S
    dD/dz_j = (u_tail - U q_tail) Q_j / Q_tail       for every other column

where Q_j / Q_tail = exp(z_j - log-sum-exp outside S) is never formed as a quotient of two underflowed numbers. A
constant times q may be added to u: it leaves the gradient as it is.

The functions above `FORMS` are written once, for tensors of any shape, in operations that PyTorch and Triton both have
(those imported by name): triton/divergences.py compiles the same source with Triton's. A form takes log p, log q, the
divergence's parameter and 1 minus it, and gives f and u, u without such a multiple of q. No form subtracts two numbers
that a parameter near 0 or 1 makes nearly equal.
"""

from typing import NamedTuple

import torch
from torch import Tensor, exp, expm1, log1p, where

from megakd.kernels.records import Merged

absolute, at_most, at_least = torch.abs, torch.clamp_max, torch.clamp_min


def weighted(log_weight, x):
    """exp(log_weight) * x, and 0 where the weight is 0, whatever x is."""
    weight = exp(log_weight)
    return where(weight > 0, weight * x, 0.0)


def log_mix(gap, share, rest):
    """log(rest + share * exp(gap)), exact where it is nearly 0; share + rest = 1. The gap may be infinite."""
    if share <= rest:
        near = at_most(gap, 80.0)
        mixed = log1p(share * expm1(near)) + at_least(gap - 80.0, 0.0)
    else:
        near = at_least(gap, -80.0)
        mixed = near + log1p(rest * expm1(-near))
    return mixed


def excess(x):
    """exp(x) - 1 - x, exact where it is nearly 0."""
    series = x * x * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8)))))) / 2
    return where(absolute(x) < 0.5, series, expm1(x) - x)


def forward_kl(log_p, log_q, _share, _rest):
    """f = p (log p - log q), u = -p: KL(p || q)."""
    return weighted(log_p, log_p - log_q), -exp(log_p)


def reverse_kl(log_p, log_q, _share, _rest):
    """f = u = q (log q - log p), the u less q: KL(q || p)."""
    f = weighted(log_q, log_q - log_p)
    return f, f


def jsd(log_p, log_q, beta, rest):
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q; u = (1 - beta) q (log q - log m)."""
    gap = log_p - log_q
    u = -rest * weighted(log_q, log_mix(gap, beta, rest))
    return u - beta * weighted(log_p, log_mix(-gap, rest, beta)), u


def skew_forward_kl(log_p, log_q, skew, rest):
    """KL(p || m) with m = skew p + (1 - skew) q; u = -p (1 - skew) q / m, plus (1 - skew) q."""
    gap, q = log_p - log_q, exp(log_q)
    u = where(q > 0, rest * rest * exp(-log_mix(gap, skew, rest)) * (q - exp(log_p)), 0.0)
    return -weighted(log_p, log_mix(-gap, rest, skew)), u


def skew_reverse_kl(log_p, log_q, skew, rest):
    """KL(q || m) with m = skew q + (1 - skew) p; u = q (log q - log m - skew q / m), plus skew q."""
    log_q_over_m = -log_mix(log_p - log_q, rest, skew)
    if skew <= rest:  # noqa: SIM108 (the exponential may be as large as 1 / skew)
        u = log_q_over_m - skew * expm1(log_q_over_m)
    else:  # the logarithm may be nearly 0
        u = rest * expm1(log_q_over_m) - excess(log_q_over_m)
    return weighted(log_q, log_q_over_m), weighted(log_q, u)


def alpha(log_p, log_q, share, rest):
    """(1 - sum p^a q^(1 - a)) / (a (1 - a)), as a sum of a p + (1 - a) q - p^a q^(1 - a); u = -p^a q^(1 - a) / a.

    For a up to 1/2 u has q / a added: near 0 it is q (log q - log p), that of reverse_kl, as it is -p near 1.
    """
    gap = log_p - log_q
    if share <= rest:
        moved = weighted(log_q, expm1(share * gap))
        f = (share * (exp(log_p) - exp(log_q)) - moved) / share / rest
        u = -moved / share
    else:
        f = (rest * (exp(log_q) - exp(log_p)) - weighted(log_p, expm1(-rest * gap))) / share / rest
        u = -exp(share * log_p + rest * log_q) / share
    return f, u


def tvd(log_p, log_q, _share, _rest):
    """sum |p - q| / 2; u = q sign(q - p) / 2."""
    p, q = exp(log_p), exp(log_q)
    return absolute(p - q) / 2, where(q > p, q, where(q < p, -q, 0.0)) / 2


FORMS = {form.__name__: form for form in (forward_kl, reverse_kl, jsd, skew_forward_kl, skew_reverse_kl, alpha, tvd)}
SHARED = (weighted, log_mix, excess)  # what forms call, beside operations


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

    Where the others find no mass in S (no entries, or none whose probability is above 0 in float32) there is nothing to
    compare: all is 0, and so are D and its gradient.
    """
    mass_T, nothing_T = merged.teacher_mass_T, torch.full_like(merged.teacher_mass_T, -torch.inf)
    some_T = mass_T > 0
    rescaled = tail in ("renormalize", "renormalize_teacher")
    q_tail_T, log_entries_T = merged.log_student_tail_T, merged.entry_sum_T.log()
    if tail != "bucket":
        q_tail_T = nothing_T if tail == "renormalize" else q_tail_T.where(some_T, -torch.inf)
    q_shift_T = (
        log_entries_T.where(merged.entry_sum_T > 0, 0) if tail == "renormalize" else merged.lse_above_entry_max_T
    )
    return Compared(
        p_shift_T=mass_T.log().where(some_T, 0) if rescaled else torch.zeros_like(mass_T),
        q_shift_T=q_shift_T.where(some_T, torch.inf) if rescaled else q_shift_T,
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


def f_and_u(divergence: str, log_p: Tensor, log_q: Tensor, parameter: float) -> tuple[Tensor, Tensor]:
    """The form of a divergence at some outcomes, of whatever shape."""
    return FORMS[divergence](log_p, log_q, parameter, 1 - parameter)


def entry_sums(divergence: str, log_p_TK: Tensor, log_q_TK: Tensor, parameter: float) -> Tensor:
    """Sums of f and of u over this rank's entries: [T, 2], float32, to be summed over the ranks."""
    return torch.stack([x_TK.sum(1) for x_TK in f_and_u(divergence, log_p_TK, log_q_TK, parameter)], 1)


def evaluate(divergence: str, c: Compared, merged: Merged, sums_T2: Tensor | None, parameter: float) -> Value:
    """The divergence of the whole vocabulary; `sums_T2` over all ranks, None unless `mixes(divergence)`."""
    if sums_T2 is not None:
        f_T, u_T = sums_T2.unbind(1)
    elif divergence == "forward_kl":
        f_T = c.p_shift_T.neg().exp() * (merged.cross_T + merged.teacher_mass_T * (c.q_shift_T - c.p_shift_T))
        f_T, u_T = f_T.where(merged.teacher_mass_T > 0, 0), -c.p_mass_T
    else:
        f_T = c.q_shift_T.neg().exp() * (merged.drift_T + merged.entry_sum_T * (c.p_shift_T - c.q_shift_T))
        q_some_T = (merged.entry_sum_T > 0) & (c.q_shift_T < torch.inf)  # where q is 0, exp(-q_shift) may be infinite
        f_T = u_T = f_T.where(q_some_T, 0)
    f_tail_T, u_tail_T = f_and_u(divergence, c.log_p_tail_T, c.log_q_tail_T, parameter)
    u_total_T = u_T + u_tail_T
    return Value(f_T + f_tail_T, u_total_T, u_tail_T - u_total_T * c.log_q_tail_T.exp())
