"""The loss around the row passes in Triton: what `terms` and `records` do in some 180 launches, in four (`records` here
has the fourth).

On a GPU the row passes of a call take about a millisecond, and so would the launches of these small steps. The numbers
are those of the PyTorch functions of the same names, to rounding. Divergences that mix P and Q look at the entries
between two collectives; their `evaluate` stays in PyTorch.

Sizes: T tokens, K entries per token, R ranks, L lanes of a record, B tokens of a program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megakd.kernels.triton.divergences import form, logaddexp
from megakd.kernels.triton.records import maxima, sums
from megakd.kernels.triton.tiles import INF, finite, on_its_device, row_lanes
from megakd.kernels.vocab import MASKED

MASKED_LABEL = tl.constexpr(MASKED)
B = 128


@on_its_device
def localize(
    ids_TK: Tensor, logprobs_TK: Tensor, labels_T: Tensor, start: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of `terms.Supervised`, for a shard whose `width` real columns begin with id `start`."""
    tokens, top_k = ids_TK.shape
    columns_TK, used_logprobs_TK = ids_TK.new_empty((tokens, top_k)), logprobs_TK.new_empty((tokens, top_k))
    label_columns_T, supervised_T = labels_T.new_empty(tokens), labels_T.new_empty(tokens, dtype=torch.bool)
    if tokens:
        _localize[tokens,](
            ids_TK.contiguous(), logprobs_TK.contiguous(), labels_T.contiguous(), columns_TK, used_logprobs_TK,
            label_columns_T, supervised_T, start, width, top_k, **row_lanes(top_k),
        )  # fmt: skip
    return supervised_T, columns_TK, used_logprobs_TK, label_columns_T


@triton.jit
def _localize(
    ids, logprobs, labels, columns, used_logprobs, label_columns, supervised, start, width, entries, K: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    on = label != MASKED_LABEL
    here = (label >= start) & (label < start + width)
    tl.store(supervised + row, on)
    tl.store(label_columns + row, tl.where(here, label - start, -1))
    k = tl.arange(0, K)
    id_K = tl.load(ids + row * entries + k, mask=k < entries, other=-1)
    logprob_K = tl.load(logprobs + row * entries + k, mask=k < entries, other=-INF)
    used_K = on & (id_K >= start) & (id_K < start + width) & (logprob_K != -INF)
    tl.store(columns + row * entries + k, tl.where(used_K, id_K - start, -1), mask=k < entries)
    tl.store(used_logprobs + row * entries + k, tl.where(used_K, logprob_K, -INF), mask=k < entries)


@on_its_device
def evaluate(
    records_RTL: Tensor,
    supervised_T: Tensor,
    log_tail_T: Tensor,
    entropy_T: Tensor | None,
    labels_T: Tensor,
    size: int,
    divergence: str,
    tail: str,
    weights: tuple[float, float],
    temperature: float,
    mass_tolerance: float,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """What `terms.evaluate` makes of the records of all ranks, for forward_kl and reverse_kl.

    Args:
        size: the real vocabulary. weights: kd_weight and ce_weight.
    Returns:
        The fields of KDLoss, float32 [T], no views, so that autograd lets them be changed in place; those of Saved,
        float64 [8, T]; and whether a row is wrong (a stray label, or a teacher's mass that is not 1 within
        `mass_tolerance`), bool [T].
    """
    ranks, tokens, lanes = records_RTL.shape
    outputs = [records_RTL.new_empty(tokens) for _ in range(5)]
    saved_8T = records_RTL.new_empty((8, tokens), dtype=torch.float64)
    wrong_T = torch.empty_like(supervised_T)
    entropy_T = None if entropy_T is None else entropy_T.contiguous()
    if tokens:
        _evaluate[triton.cdiv(tokens, B),](
            records_RTL, supervised_T, log_tail_T.contiguous(), entropy_T, labels_T.contiguous(), *outputs, saved_8T,
            wrong_T, tokens, ranks, size, *weights, temperature, mass_tolerance, DIVERGENCE=divergence, TAIL=tail,
            SAMPLED=entropy_T is not None, AT_ONE=lanes == 10, L=lanes, B=B,
        )  # fmt: skip
    return outputs, saved_8T, wrong_T


@triton.jit
def _evaluate(
    records, supervised, log_tails, entropies, labels, loss_out, kd_out, ce_out, teacher_mass_out, student_mass_out,
    saved, wrong, tokens, ranks, size, kd_weight, ce_weight, temperature, mass_tolerance, DIVERGENCE: tl.constexpr,
    TAIL: tl.constexpr, SAMPLED: tl.constexpr, AT_ONE: tl.constexpr, L: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    some = t < tokens
    on = tl.load(supervised + t, mask=some, other=0) != 0
    label = tl.load(labels + t, mask=some, other=MASKED_LABEL)
    log_p_tail = tl.where(on, tl.load(log_tails + t, mask=some, other=0.0), 0.0).to(tl.float64)
    temperature = tl.cast(temperature, tl.float64)

    records += t * L
    outside_max, entry_max, label_logit = maxima(records, ranks, tokens, some, L, B)
    outside_sum, entry_sum, outside_at_one, entry_at_one, cross, drift, mass = sums(
        records, ranks, tokens, some, outside_max, entry_max, temperature, AT_ONE, L, B
    )
    top = finite(tl.maximum(outside_max, entry_max))
    outside = tl.log(outside_sum) + (outside_max - top) / temperature
    entry = tl.log(entry_sum) + (entry_max - top) / temperature
    lse = logaddexp(outside, entry)
    lse_at_one = logaddexp(tl.log(outside_at_one) + (outside_max - top), tl.log(entry_at_one) + (entry_max - top))
    outside_max, entry_max = finite(outside_max), finite(entry_max)
    ce = lse_at_one - (label_logit - top)

    # The tail rule and the divergence: `divergences.compare` and `divergences.evaluate`.
    has_mass = mass > 0
    p_shift, p_mass = tl.zeros((B,), tl.float64), mass
    q_shift, log_q_tail = lse + (top - entry_max) / temperature, outside - lse
    if TAIL == "renormalize" or TAIL == "renormalize_teacher":
        p_shift, p_mass = tl.where(has_mass, tl.log(mass), 0.0), has_mass.to(tl.float64)
    if TAIL == "renormalize":
        q_shift = tl.where(has_mass & (entry_sum > 0), tl.log(entry_sum), 0.0)
        log_q_tail = tl.full((B,), -INF, tl.float64)
    mass_tail = tl.exp(log_p_tail)
    if TAIL != "bucket":
        log_p_tail = tl.full((B,), -INF, tl.float64)
        log_q_tail = tl.where(has_mass, log_q_tail, -INF)
    if DIVERGENCE == "forward_kl":
        kd = tl.where(has_mass, tl.exp(-p_shift) * (cross + mass * (q_shift - p_shift)), 0.0)
        u = -p_mass
    else:
        kd = tl.exp(-q_shift) * (drift + entry_sum * (p_shift - q_shift))
        kd = tl.where(has_mass & (entry_sum > 0), kd, 0.0)  # exp(-q_shift) may be infinite where q is 0
        u = kd
    kd_tail, u_tail = form(log_p_tail, log_q_tail, 0.0, DIVERGENCE)
    u_total = u + u_tail
    kd += kd_tail
    if SAMPLED:
        kd -= tl.load(entropies + t, mask=some, other=0.0).to(tl.float64)
    outside_factor = u_tail - u_total * tl.exp(log_q_tail)

    loss = tl.zeros((B,), tl.float64)  # a part whose weight is 0 has no say, even where it is infinite
    loss += tl.where(kd_weight != 0, kd_weight * temperature * temperature * kd, 0.0)
    loss += tl.where(ce_weight != 0, ce_weight * ce, 0.0)
    _put(loss_out, 0, tl.where(on, loss, 0.0), t, tokens)
    _put(kd_out, 0, tl.where(on, kd, 0.0), t, tokens)
    _put(ce_out, 0, tl.where(on, ce, 0.0), t, tokens)
    _put(teacher_mass_out, 0, tl.where(on, mass, 0.0), t, tokens)
    _put(student_mass_out, 0, tl.where(on, tl.exp(entry - lse), 0.0), t, tokens)
    outside_some = outside_sum > 0
    _put(saved, 0, outside_max, t, tokens)
    _put(saved, 1, entry_max, t, tokens)
    _put(saved, 2, p_shift, t, tokens)
    _put(saved, 3, q_shift, t, tokens)
    _put(saved, 4, u_total, t, tokens)
    _put(saved, 5, tl.where(outside_some, outside_factor / outside_sum, 0.0), t, tokens)
    _put(saved, 6, tl.where(outside_some, tl.exp(outside_max - top - lse_at_one), 0.0), t, tokens)
    _put(saved, 7, entry_max - top - lse_at_one, t, tokens)
    torn = (tl.abs(mass + mass_tail - 1) <= mass_tolerance) == 0  # NaN is torn
    tl.store(wrong + t, on & (torn | (label < 0) | (label >= size)), mask=some)


@triton.jit
def _put(out, field, value, t, tokens):
    tl.store(out + tl.cast(tokens, tl.int64) * field + t, value.to(out.dtype.element_ty), mask=t < tokens)


@on_its_device
def gradient_factors(
    grad_T: Tensor,
    entry_logits_TK: Tensor,
    logprobs_TK: Tensor,
    columns_TK: Tensor,
    label_columns_T: Tensor,
    saved: tuple[Tensor, ...],
    divergence: str,
    parameter: float,
    weights: tuple[float, float],
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """The fields of `terms.Factors`; see `terms.gradient_factors`."""
    tokens, top_k = columns_TK.shape
    apart = temperature != 1 and weights[1] != 0
    max_T, outside_T, label_grad_T, outside_at_one_T = logprobs_TK.new_empty((4, tokens))
    entry_grad_TK = logprobs_TK.new_empty((tokens, top_k))
    if tokens:
        _gradient_factors[tokens,](
            grad_T.contiguous(), entry_logits_TK.contiguous(), logprobs_TK.contiguous(), columns_TK.contiguous(),
            label_columns_T, *saved, max_T, outside_T,
            outside_at_one_T, entry_grad_TK, label_grad_T, top_k, parameter, *weights, temperature,
            DIVERGENCE=divergence, APART=apart, **row_lanes(top_k),
        )  # fmt: skip
    return max_T, outside_T, outside_at_one_T if apart else None, entry_grad_TK, label_grad_T


@triton.jit
def _gradient_factors(
    grad, entry_logits, logprobs, columns, label_columns, outside_max, entry_max, p_shift, q_shift, u_total, outside,
    outside_at_one, shift_at_one, max_out, outside_out, outside_at_one_out, entry_out, label_out, entries, parameter,
    kd_weight, ce_weight, temperature, DIVERGENCE: tl.constexpr, APART: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    kd_factor = kd_weight * temperature * tl.load(grad + row)
    ce_factor = ce_weight * tl.load(grad + row)
    k = tl.arange(0, K)
    x_K = tl.load(entry_logits + row * entries + k, mask=k < entries, other=-INF)
    logprob_K = tl.load(logprobs + row * entries + k, mask=k < entries, other=-INF)
    column_K = tl.load(columns + row * entries + k, mask=k < entries, other=-1)
    gap_K = x_K - tl.load(entry_max + row).to(tl.float32)
    log_p_K = logprob_K - tl.load(p_shift + row).to(tl.float32)
    log_q_K = gap_K / temperature - tl.load(q_shift + row).to(tl.float32)
    log_q_K = tl.where(logprob_K > -INF, log_q_K, -INF)
    _, u_K = form(log_p_K, log_q_K, parameter, DIVERGENCE)
    kd_K = kd_factor * (u_K - tl.load(u_total + row).to(tl.float32) * tl.exp(log_q_K))
    softmax_K = tl.exp(gap_K + tl.load(shift_at_one + row).to(tl.float32))
    is_label_K = (column_K == tl.load(label_columns + row)) & (column_K >= 0)
    ce_K = ce_factor * (softmax_K - is_label_K.to(tl.float32))
    grad_K = tl.where(kd_weight != 0, kd_K, 0.0) + tl.where(ce_weight != 0, ce_K, 0.0)
    tl.store(entry_out + row * entries + k, grad_K, mask=k < entries)

    kd_outside = tl.where(kd_weight != 0, kd_factor * tl.load(outside + row), 0.0)
    ce_outside = tl.where(ce_weight != 0, ce_factor * tl.load(outside_at_one + row), 0.0)
    if APART:
        tl.store(outside_at_one_out + row, ce_outside.to(tl.float32))
    else:
        kd_outside += ce_outside
    tl.store(outside_out + row, kd_outside.to(tl.float32))
    tl.store(max_out + row, tl.load(outside_max + row).to(tl.float32))
    tl.store(label_out + row, -ce_factor)
