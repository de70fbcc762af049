"""The loss around the row passes in Triton: what `terms` does in some 180 launches, in three or four.

On a GPU the row passes of a call take about a millisecond, and so would the launches of these small steps. The numbers
are those of the PyTorch functions of the same names, to rounding. Divergences that mix P and Q look at the entries
between two collectives: `entry_sums`.

Sizes: T tokens, K entries per token, R ranks, L lanes of a record, B tokens of a program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megakd.kernels.triton.divergences import FORMS
from megakd.kernels.triton.records import log_masses, merge
from megakd.kernels.triton.tiles import INF, finite, logaddexp, on_its_device, row_lanes
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
def entry_sums(
    records_RTL: Tensor,
    entry_logits_TK: Tensor,
    logprobs_TK: Tensor,
    divergence: str,
    tail: str,
    parameter: float,
    temperature: float,
) -> Tensor:
    """`divergences.entry_sums` of this rank's entries, as a tail rule compares them: [T, 2], float32."""
    (ranks, tokens, lanes), top_k = records_RTL.shape, logprobs_TK.shape[1]
    sums_T2 = records_RTL.new_empty((tokens, 2))
    if tokens:
        _entry_sums[tokens,](
            records_RTL, entry_logits_TK.contiguous(), logprobs_TK.contiguous(), sums_T2, tokens, ranks, top_k,
            parameter, 1 - parameter, temperature, FORM=FORMS[divergence], TAIL=tail, AT_ONE=lanes == 10, L=lanes,
            **row_lanes(top_k),
        )  # fmt: skip
    return sums_T2


@triton.jit
def _entry_sums(
    records, entry_logits, logprobs, sums_out, tokens, ranks, entries, parameter, rest, temperature,
    FORM: tl.constexpr, TAIL: tl.constexpr, AT_ONE: tl.constexpr, L: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    tops, masses, _, _ = merge(records + t * L, ranks, tokens, t < tokens, temperature, AT_ONE, L, 1)
    outside_max, entry_max, _ = tops
    outside_sum, entry_sum, mass = masses
    top = finite(tl.maximum(outside_max, entry_max))
    outside, _, lse = log_masses(outside_max, outside_sum, entry_max, entry_sum, top, temperature)
    p_shift, q_shift, _, _ = compare(entry_max, entry_sum, mass, top, outside, lse, temperature, TAIL)
    k = tl.arange(0, K)
    logprob_K = tl.load(logprobs + t * entries + k, mask=k < entries, other=-INF)
    x_K = tl.load(entry_logits + t * entries + k, mask=k < entries, other=-INF)
    above_K = (x_K - finite(entry_max).to(tl.float32)) / temperature
    log_q_K = tl.where(logprob_K > -INF, above_K - q_shift.to(tl.float32), -INF)
    f_K, u_K = FORM(logprob_K - p_shift.to(tl.float32), log_q_K, parameter, rest)
    two = tl.arange(0, 2)
    tl.store(sums_out + t * 2 + two, tl.where(two == 0, tl.sum(f_K, 0), tl.sum(u_K, 0)))


@triton.jit
def compare(entry_max, entry_sum, mass, top, outside, lse, temperature, TAIL: tl.constexpr):
    """`divergences.compare`, but for the teacher's tail."""
    has_mass = mass > 0
    p_shift, p_mass = tl.zeros_like(mass), mass
    q_shift, log_q_tail = lse + (top - finite(entry_max)) / temperature, outside - lse
    if TAIL == "renormalize" or TAIL == "renormalize_teacher":
        p_shift, p_mass = tl.where(has_mass, tl.log(mass), 0.0), has_mass.to(tl.float64)
    if TAIL == "renormalize":
        q_shift, log_q_tail = tl.where(entry_sum > 0, tl.log(entry_sum), 0.0), tl.zeros_like(mass) - INF
    elif TAIL != "bucket":
        log_q_tail = tl.where(has_mass, log_q_tail, -INF)
    if TAIL == "renormalize" or TAIL == "renormalize_teacher":
        q_shift = tl.where(has_mass, q_shift, INF)
    return p_shift, q_shift, p_mass, log_q_tail


@on_its_device
def evaluate(
    records_RTL: Tensor,
    sums_RT2: Tensor | None,
    supervised_T: Tensor,
    log_tail_T: Tensor,
    entropy_T: Tensor | None,
    labels_T: Tensor,
    size: int,
    divergence: str,
    tail: str,
    parameter: float,
    weights: tuple[float, float],
    temperature: float,
    mass_tolerance: float,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """What `terms.evaluate` makes of the records of all ranks.

    Args:
        sums_RT2: every rank's `entry_sums`, for divergences that mix P and Q.
        size: the real vocabulary. weights: kd_weight and ce_weight.
    Returns:
        The fields of KDLoss, float32 [T], no views, so that autograd lets them be changed in place; those of Saved,
        float64 [8, T]; and whether a row is fine (no stray label, and a teacher's mass that is 1 within
        `mass_tolerance`), bool [T].
    """
    ranks, tokens, lanes = records_RTL.shape
    outputs = [records_RTL.new_empty(tokens) for _ in range(5)]
    saved_8T = records_RTL.new_empty((8, tokens), dtype=torch.float64)
    fine_T = torch.empty_like(supervised_T)
    entropy_T = None if entropy_T is None else entropy_T.contiguous()
    if tokens:
        _evaluate[triton.cdiv(tokens, B),](
            records_RTL, sums_RT2, supervised_T, log_tail_T.contiguous(), entropy_T, labels_T.contiguous(), *outputs,
            saved_8T, fine_T, tokens, ranks, size, parameter, 1 - parameter, *weights, temperature, mass_tolerance,
            FORM=FORMS[divergence], SUMS=divergence if sums_RT2 is None else "given", TAIL=tail,
            SAMPLED=entropy_T is not None, AT_ONE=lanes == 10, L=lanes, B=B,
        )  # fmt: skip
    return outputs, saved_8T, fine_T


@triton.jit
def _evaluate(
    records, sums, supervised, log_tails, entropies, labels, loss_out, kd_out, ce_out, teacher_mass_out,
    student_mass_out, saved, fine, tokens, ranks, size, parameter, rest, kd_weight, ce_weight, temperature,
    mass_tolerance, FORM: tl.constexpr, SUMS: tl.constexpr, TAIL: tl.constexpr, SAMPLED: tl.constexpr,
    AT_ONE: tl.constexpr, L: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    some = t < tokens
    on = tl.load(supervised + t, mask=some, other=0) != 0
    label = tl.load(labels + t, mask=some, other=MASKED_LABEL)
    log_p_tail = tl.where(on, tl.load(log_tails + t, mask=some, other=0.0), 0.0).to(tl.float64)
    temperature = tl.cast(temperature, tl.float64)

    tops, masses, gaps, at_one = merge(records + t * L, ranks, tokens, some, temperature, AT_ONE, L, B)
    outside_max, entry_max, label_logit = tops
    outside_sum, entry_sum, mass = masses
    cross, drift = gaps
    top = finite(tl.maximum(outside_max, entry_max))
    outside, entry, lse = log_masses(outside_max, outside_sum, entry_max, entry_sum, top, temperature)
    lse_at_one = logaddexp(tl.log(at_one[0]) + (outside_max - top), tl.log(at_one[1]) + (entry_max - top))
    ce = lse_at_one - (label_logit - top)

    # The tail rule and the divergence: `divergences.compare` and `divergences.evaluate`.
    p_shift, q_shift, p_mass, log_q_tail = compare(entry_max, entry_sum, mass, top, outside, lse, temperature, TAIL)
    mass_tail = tl.exp(log_p_tail)
    if TAIL != "bucket":
        log_p_tail = tl.full((B,), -INF, tl.float64)
    if SUMS == "forward_kl":
        kd = tl.where(mass > 0, tl.exp(-p_shift) * (cross + mass * (q_shift - p_shift)), 0.0)
        u = -p_mass
    elif SUMS == "reverse_kl":
        kd = tl.exp(-q_shift) * (drift + entry_sum * (p_shift - q_shift))
        kd = tl.where((entry_sum > 0) & (q_shift < INF), kd, 0.0)  # where q is 0, exp(-q_shift) may be infinite
        u = kd
    else:
        tl.static_assert(SUMS == "given")
        kd, u = sum_over_ranks(sums, ranks, tokens, t, some, B)
    kd_tail, u_tail = FORM(log_p_tail, log_q_tail, parameter, rest)
    u_total = u + u_tail
    kd += kd_tail
    if SAMPLED:
        kd -= tl.load(entropies + t, mask=some, other=0.0).to(tl.float64)
    outside_factor = u_tail - u_total * tl.exp(log_q_tail)

    loss = tl.zeros((B,), tl.float64)  # a part whose weight is 0 has no say, even where it is infinite
    loss += tl.where(kd_weight != 0, kd_weight * temperature * temperature * kd, 0.0)
    loss += tl.where(ce_weight != 0, ce_weight * ce, 0.0)
    put(loss_out, 0, tl.where(on, loss, 0.0), t, tokens)
    put(kd_out, 0, tl.where(on, kd, 0.0), t, tokens)
    put(ce_out, 0, tl.where(on, ce, 0.0), t, tokens)
    put(teacher_mass_out, 0, tl.where(on, mass, 0.0), t, tokens)
    put(student_mass_out, 0, tl.where(on, tl.exp(entry - lse), 0.0), t, tokens)
    outside_some, outside_max, entry_max = outside_sum > 0, finite(outside_max), finite(entry_max)
    put(saved, 0, outside_max, t, tokens)
    put(saved, 1, entry_max, t, tokens)
    put(saved, 2, p_shift, t, tokens)
    put(saved, 3, q_shift, t, tokens)
    put(saved, 4, u_total, t, tokens)
    put(saved, 5, tl.where(outside_some, outside_factor / outside_sum, 0.0), t, tokens)
    put(saved, 6, tl.where(outside_some, tl.exp(outside_max - top - lse_at_one), 0.0), t, tokens)
    put(saved, 7, entry_max - top - lse_at_one, t, tokens)
    whole = tl.abs(mass + mass_tail - 1) <= mass_tolerance  # NaN is not
    tl.store(fine + t, (whole & (label >= 0) & (label < size)) | (on == 0), mask=some)


@triton.jit
def sum_over_ranks(sums, ranks, tokens, t, some, B: tl.constexpr):
    """Both columns of [R, T, 2], summed in float64 in rank order."""
    f, u = tl.zeros((B,), tl.float64), tl.zeros((B,), tl.float64)
    for rank in range(ranks):
        row = sums + (tl.cast(rank, tl.int64) * tokens + t) * 2
        f += tl.load(row, mask=some, other=0.0).to(tl.float64)
        u += tl.load(row + 1, mask=some, other=0.0).to(tl.float64)
    return f, u


@triton.jit
def put(out, field, value, t, tokens):
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
            outside_at_one_T, entry_grad_TK, label_grad_T, top_k, parameter, 1 - parameter, *weights, temperature,
            FORM=FORMS[divergence], APART=apart, **row_lanes(top_k),
        )  # fmt: skip
    return max_T, outside_T, outside_at_one_T if apart else None, entry_grad_TK, label_grad_T


@triton.jit
def _gradient_factors(
    grad, entry_logits, logprobs, columns, label_columns, outside_max, entry_max, p_shift, q_shift, u_total, outside,
    outside_at_one, shift_at_one, max_out, outside_out, outside_at_one_out, entry_out, label_out, entries, parameter,
    rest, kd_weight, ce_weight, temperature, FORM: tl.constexpr, APART: tl.constexpr, K: tl.constexpr,
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
    _, u_K = FORM(log_p_K, log_q_K, parameter, rest)
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
