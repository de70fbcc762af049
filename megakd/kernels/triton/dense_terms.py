"""What dense_kd_loss does around the passes over rows, in Triton: two launches instead of some sixty small ones.

Sizes: T tokens, R ranks, B tokens of a program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megakd.kernels.triton.records import lane
from megakd.kernels.triton.terms import put, sum_over_ranks
from megakd.kernels.triton.tiles import INF, finite, on_its_device
from megakd.kernels.vocab import MASKED

MASKED_LABEL = tl.constexpr(MASKED)
LANES = tl.constexpr(7)  # of a record
B = 128


@on_its_device
def merge(records_RT7: Tensor, temperatures: tuple[float, float], divergence: str) -> list[Tensor]:
    """The fields of `dense.Both`; those of the two softmaxes in float32."""
    ranks, tokens, _ = records_RT7.shape
    scales_5T = records_RT7.new_empty((5, tokens))
    losses_2T = records_RT7.new_empty((2, tokens), dtype=torch.float64)
    if tokens:
        _dense_merge[triton.cdiv(tokens, B),](
            records_RT7.contiguous(), scales_5T, losses_2T, tokens, ranks, *temperatures,
            FORWARD=divergence == "forward_kl", B=B,
        )  # fmt: skip
    return [*scales_5T, *losses_2T]


@triton.jit
def _dense_merge(
    records, scales, losses, tokens, ranks, z_temperature, t_temperature, FORWARD: tl.constexpr, B: tl.constexpr
):
    t = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    some = t < tokens
    records += t * LANES
    z_temperature, t_temperature = tl.cast(z_temperature, tl.float64), tl.cast(t_temperature, tl.float64)
    z_max = tl.full((B,), -INF, tl.float64)
    t_max, label_logit = z_max, z_max
    for rank in range(ranks):
        z_max = tl.maximum(z_max, lane(records, rank, tokens, 0, some, LANES))
        t_max = tl.maximum(t_max, lane(records, rank, tokens, 2, some, LANES))
        label_logit = tl.maximum(label_logit, lane(records, rank, tokens, 5, some, LANES))
    z_max, t_max = finite(z_max), finite(t_max)
    z_sum = tl.zeros((B,), tl.float64)
    t_sum, cross, at_one = z_sum, z_sum, z_sum
    for rank in range(ranks):
        raw_gap = lane(records, rank, tokens, 0, some, LANES) - z_max
        z_gap = raw_gap / z_temperature
        t_gap = (lane(records, rank, tokens, 2, some, LANES) - t_max) / t_temperature
        z_here, t_here = lane(records, rank, tokens, 1, some, LANES), lane(records, rank, tokens, 3, some, LANES)
        cross_here, apart = lane(records, rank, tokens, 4, some, LANES), finite(t_gap) - finite(z_gap)
        z_sum += z_here * tl.exp(z_gap)
        t_sum += t_here * tl.exp(t_gap)
        at_one += lane(records, rank, tokens, 6, some, LANES) * tl.exp(raw_gap)
        if FORWARD:
            cross += tl.exp(t_gap) * (cross_here + t_here * apart)
        else:
            cross += tl.exp(z_gap) * (cross_here - z_here * apart)
    z_log, t_log, log_at_one = tl.log(z_sum), tl.log(t_sum), tl.log(at_one)
    kd = cross / t_sum - t_log + z_log if FORWARD else cross / z_sum - z_log + t_log
    put(scales, 0, z_max, t, tokens)
    put(scales, 1, z_log, t, tokens)
    put(scales, 2, t_max, t, tokens)
    put(scales, 3, t_log, t, tokens)
    put(scales, 4, log_at_one, t, tokens)
    put(losses, 0, kd, t, tokens)
    put(losses, 1, log_at_one - (label_logit - z_max), t, tokens)


@on_its_device
def total(
    kd_T: Tensor,
    ce_T: Tensor,
    teacher_log_sum_T: Tensor,
    sums_RT2: Tensor | None,
    supervised_T: Tensor,
    labels_T: Tensor,
    size: int,
    divergence: str,
    weights: tuple[float, float],
    temperature: float,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """What `dense.evaluate` makes of the merged numbers.

    Args:
        sums_RT2: every rank's `dense_sums`, for divergences that mix P and Q.
        size: the real vocabulary. weights: kd_weight and ce_weight. temperature: the student's.
    Returns:
        The fields of KDLoss and U, float32 [T], no views; and whether a row is fine (no stray label, a finite teacher).
    """
    tokens = len(labels_T)
    outputs = [teacher_log_sum_T.new_empty(tokens) for _ in range(5)]
    u_total_T, fine_T = torch.empty_like(outputs[0]), torch.empty_like(supervised_T)
    if tokens:
        _dense_total[triton.cdiv(tokens, B),](
            kd_T, ce_T, teacher_log_sum_T, sums_RT2, supervised_T, labels_T.contiguous(), *outputs, u_total_T, fine_T,
            tokens, 0 if sums_RT2 is None else len(sums_RT2), size, *weights, temperature,
            SUMS=divergence if sums_RT2 is None else "given", B=B,
        )  # fmt: skip
    return outputs, u_total_T, fine_T


@triton.jit
def _dense_total(
    kds, ces, teacher_log_sums, sums, supervised, labels, loss_out, kd_out, ce_out, teacher_mass_out, student_mass_out,
    u_out, fine, tokens, ranks, size, kd_weight, ce_weight, temperature, SUMS: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    some = t < tokens
    on = tl.load(supervised + t, mask=some, other=0) != 0
    label = tl.load(labels + t, mask=some, other=MASKED_LABEL)
    kd, ce = tl.load(kds + t, mask=some, other=0.0), tl.load(ces + t, mask=some, other=0.0)
    if SUMS == "forward_kl":
        u = tl.zeros_like(kd) - 1
    elif SUMS == "reverse_kl":
        u = kd
    else:
        tl.static_assert(SUMS == "given")
        kd, u = sum_over_ranks(sums, ranks, tokens, t, some, B)
    temperature = tl.cast(temperature, tl.float64)
    loss = tl.where(kd_weight != 0, kd_weight * temperature * temperature * kd, 0.0)
    loss += tl.where(ce_weight != 0, ce_weight * ce, 0.0)
    whole = on.to(tl.float32)
    put(loss_out, 0, tl.where(on, loss, 0.0), t, tokens)
    put(kd_out, 0, tl.where(on, kd, 0.0), t, tokens)
    put(ce_out, 0, tl.where(on, ce, 0.0), t, tokens)
    put(teacher_mass_out, 0, whole, t, tokens)
    put(student_mass_out, 0, whole, t, tokens)
    put(u_out, 0, u, t, tokens)
    teacher = tl.load(teacher_log_sums + t, mask=some, other=0.0)
    tl.store(fine + t, ((label >= 0) & (label < size) & (teacher == teacher)) | (on == 0), mask=some)
