"""The passes of `megakd.kernels.dense_rows` in Triton: the same functions, signatures and results.

    dense_record     a program reads a row of both models; lanes keep maxima and sums of their own and meet at the end
    dense_sums       another read of both: f and u of a divergence, summed
    dense_backward   one read of both and one write; a column's gradient depends on nothing else, so out may be the
                     student's logits

The divergence is a constant of the kernels: its form is compiled into them, and a part of it that is not needed is not
computed. A row that is not supervised is not read.

Sizes: T tokens, W columns; S, N, E in tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megakd.kernels.triton.divergences import FORMS
from megakd.kernels.triton.tiles import (
    IN_LOG2,
    INF,
    LANES,
    LOG2_E,
    Grid,
    finite,
    lane_max,
    lane_shape,
    lane_sum,
    load_tile,
    on_its_device,
    place,
    store_tile,
    tile_columns,
)


def pair_shape(*tensors_TW: Tensor) -> dict[str, int]:
    """`lane_shape` of half as many columns, for two matrices are held at a time."""
    shape = lane_shape(*tensors_TW)
    if any(x_TW.dtype != tensors_TW[0].dtype for x_TW in tensors_TW):  # 16 bytes are not as many neighbours in both
        shape |= {"S": shape["S"] * shape["E"], "E": 1}
    return shape | {"S": max(1, shape["S"] // 2)}


@on_its_device
def dense_record(
    student_TW: Tensor,
    teacher_TW: Tensor,
    label_columns_T: Tensor,
    supervised_T: Tensor,
    width: int,
    temperatures: tuple[float, float],
    divergence: str,
) -> Tensor:
    """See `dense_rows.dense_record`."""
    record_T7 = student_TW.new_empty((len(supervised_T), 7), dtype=torch.float32)
    if len(supervised_T):
        _dense_record[len(supervised_T),](
            student_TW, teacher_TW, label_columns_T, supervised_T, record_T7, *student_TW.stride(),
            *teacher_TW.stride(), width, LOG2_E / temperatures[0], LOG2_E / temperatures[1], 1 / temperatures[0],
            1 / temperatures[1], WEIGHS={"forward_kl": 1, "reverse_kl": -1}.get(divergence, 0),
            AT_ONE=temperatures[0] != 1, **pair_shape(student_TW, teacher_TW),
        )  # fmt: skip
    return record_T7


@triton.jit
def _dense_record(
    student, teacher, label_columns, supervised, record, row_stride, column_stride, teacher_row_stride,
    teacher_column_stride, width, z_scale, t_scale, z_factor, t_factor, WEIGHS: tl.constexpr, AT_ONE: tl.constexpr,
    S: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    on = tl.load(supervised + row) != 0
    stop = tl.where(on, width, 0)
    student += row * row_stride
    teacher += row * teacher_row_stride
    zero_N = tl.zeros((LANES,), tl.float32)
    z_max_N, t_max_N = zero_N - INF, zero_N - INF
    z_sum_N, t_sum_N, at_one_N, cross_N, broken_N = zero_N, zero_N, zero_N, zero_N, zero_N
    for first in range(0, stop, S * LANES * E):
        x_SNE = load_tile(student, first, stop, column_stride, S, E)
        y_SNE = load_tile(teacher, first, stop, teacher_column_stride, S, E)
        here = tile_columns(S, E) < stop - first
        broken_N += lane_sum(tl.where(here, y_SNE * 0.0, 0.0))
        z_top_N, t_top_N = tl.maximum(z_max_N, lane_max(x_SNE)), tl.maximum(t_max_N, lane_max(y_SNE))
        z_gap_N, t_gap_N = z_max_N - finite(z_top_N), t_max_N - finite(t_top_N)
        cross_N = _moved(cross_N, z_sum_N, t_sum_N, z_gap_N, t_gap_N, z_scale, t_scale, z_factor, t_factor, WEIGHS)
        below_SNE, teacher_below_SNE = x_SNE - finite(z_top_N)[None, :, None], y_SNE - finite(t_top_N)[None, :, None]
        z_weight_SNE, t_weight_SNE = tl.exp2(below_SNE * z_scale), tl.exp2(teacher_below_SNE * t_scale)
        z_sum_N = z_sum_N * tl.exp2(z_gap_N * z_scale) + lane_sum(z_weight_SNE)
        t_sum_N = t_sum_N * tl.exp2(t_gap_N * t_scale) + lane_sum(t_weight_SNE)
        if AT_ONE:
            at_one_N = at_one_N * tl.exp2(z_gap_N * IN_LOG2) + lane_sum(tl.exp2(below_SNE * IN_LOG2))
        if WEIGHS != 0:
            apart_SNE = WEIGHS * (teacher_below_SNE * t_factor - below_SNE * z_factor)
            weight_SNE = t_weight_SNE if WEIGHS == 1 else z_weight_SNE
            cross_N += lane_sum(tl.where(weight_SNE > 0, weight_SNE * apart_SNE, 0.0))
        z_max_N, t_max_N = z_top_N, t_top_N

    z_top, t_top = tl.max(z_max_N, 0), tl.max(t_max_N, 0)
    z_gap_N, t_gap_N = z_max_N - finite(z_top), t_max_N - finite(t_top)
    cross_N = _moved(cross_N, z_sum_N, t_sum_N, z_gap_N, t_gap_N, z_scale, t_scale, z_factor, t_factor, WEIGHS)
    z_sum = tl.sum(z_sum_N * tl.exp2(z_gap_N * z_scale), 0)
    broken = tl.sum(broken_N, 0)  # NaN where the teacher is not finite
    label = tl.load(label_columns + row)
    label_logit = tl.load(student + label * column_stride, mask=(label >= 0) & on, other=-INF).to(tl.float32)
    record += row * 7
    tl.store(record, z_top)
    tl.store(record + 1, z_sum)
    tl.store(record + 2, t_top)
    tl.store(record + 3, tl.sum(t_sum_N * tl.exp2(t_gap_N * t_scale), 0) + broken)
    tl.store(record + 4, tl.sum(cross_N, 0))
    tl.store(record + 5, label_logit)
    if AT_ONE:
        z_sum = tl.sum(at_one_N * tl.exp2(z_gap_N * IN_LOG2), 0)
    tl.store(record + 6, z_sum)


@triton.jit
def _moved(cross, z_sum, t_sum, z_gap, t_gap, z_scale, t_scale, z_factor, t_factor, WEIGHS: tl.constexpr):
    """The sum of weight (log weight - log of the other) when both maxima grow by -gap."""
    if WEIGHS == 1:
        scale, total, apart = tl.exp2(t_gap * t_scale), t_sum, finite(t_gap) * t_factor - finite(z_gap) * z_factor
        cross = tl.where(scale > 0, scale * (cross + total * apart), 0.0)
    if WEIGHS == -1:
        scale, total, apart = tl.exp2(z_gap * z_scale), z_sum, finite(z_gap) * z_factor - finite(t_gap) * t_factor
        cross = tl.where(scale > 0, scale * (cross + total * apart), 0.0)
    return cross


@on_its_device
def dense_sums(
    student_TW: Tensor,
    teacher_TW: Tensor,
    supervised_T: Tensor,
    width: int,
    scales: tuple,
    divergence: str,
    parameter: float,
) -> Tensor:
    """See `dense_rows.dense_sums`."""
    sums_T2 = student_TW.new_empty((len(supervised_T), 2), dtype=torch.float32)
    if len(supervised_T):
        student, teacher = scales
        _dense_sums[len(supervised_T),](
            student_TW, teacher_TW, supervised_T, *student[:2], *teacher[:2], sums_T2, *student_TW.stride(),
            *teacher_TW.stride(), width, 1 / student.temperature, 1 / teacher.temperature, parameter, 1 - parameter,
            FORM=FORMS[divergence], **pair_shape(student_TW, teacher_TW),
        )  # fmt: skip
    return sums_T2


@triton.jit
def _dense_sums(
    student, teacher, supervised, z_max, z_log_sum, t_max, t_log_sum, sums, row_stride, column_stride,
    teacher_row_stride, teacher_column_stride, width, z_factor, t_factor, parameter, rest, FORM: tl.constexpr,
    S: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    stop = tl.where(tl.load(supervised + row) != 0, width, 0)
    student += row * row_stride
    teacher += row * teacher_row_stride
    z_top, z_lse, t_top, t_lse = (tl.load(z_max + row), tl.load(z_log_sum + row), tl.load(t_max + row),
                                  tl.load(t_log_sum + row))  # fmt: skip
    f_N, u_N = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    for first in range(0, stop, S * LANES * E):
        log_q_SNE = (load_tile(student, first, stop, column_stride, S, E) - z_top) * z_factor - z_lse
        log_p_SNE = (load_tile(teacher, first, stop, teacher_column_stride, S, E) - t_top) * t_factor - t_lse
        f_SNE, u_SNE = FORM(log_p_SNE, log_q_SNE, parameter, rest)
        f_N += lane_sum(f_SNE)
        u_N += lane_sum(u_SNE)
    tl.store(sums + row * 2, tl.sum(f_N, 0))
    tl.store(sums + row * 2 + 1, tl.sum(u_N, 0))


@on_its_device
def dense_backward(
    student_TW: Tensor,
    teacher_TW: Tensor,
    label_columns_T: Tensor,
    supervised_T: Tensor,
    width: int,
    scales: tuple,
    divergence: str,
    parameter: float,
    u_total_T: Tensor,
    kd_T: Tensor | None,
    at_one,
    ce_T: Tensor | None,
    out_TW: Tensor,
) -> None:
    """See `dense_rows.dense_backward`."""
    tokens, whole_width = out_TW.shape
    grid, (student, teacher) = Grid(tokens, whole_width), scales
    if tokens and whole_width:
        _dense_backward[grid.programs](
            student_TW, teacher_TW, label_columns_T, supervised_T, *student[:2], *teacher[:2], at_one.log_sum_T,
            u_total_T, kd_T, ce_T, out_TW, *student_TW.stride(), *teacher_TW.stride(), *out_TW.stride(), width,
            whole_width, grid.parts, grid.part_columns, 1 / student.temperature, 1 / teacher.temperature, parameter,
            1 - parameter, FORM=FORMS[divergence], KD=kd_T is not None, CE=ce_T is not None,
            **pair_shape(student_TW, teacher_TW, out_TW),
        )  # fmt: skip
        torch.autograd.graph.increment_version(out_TW)  # autograd sees no write through a pointer


@triton.jit
def _dense_backward(
    student, teacher, label_columns, supervised, z_max, z_log_sum, t_max, t_log_sum, log_sum_at_one, u_total, kd, ce,
    out, row_stride, column_stride, teacher_row_stride, teacher_column_stride, out_row_stride, out_column_stride, width,
    whole_width, parts, part_columns, z_factor, t_factor, parameter, rest, FORM: tl.constexpr, KD: tl.constexpr,
    CE: tl.constexpr, S: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    row, _, start, whole_stop = place(parts, part_columns, whole_width)
    stop = tl.where(tl.load(supervised + row) != 0, tl.minimum(whole_stop, width), start)
    student += row * row_stride
    teacher += row * teacher_row_stride
    out += row * out_row_stride
    label, z_top = tl.load(label_columns + row), tl.load(z_max + row)
    for first in range(start, whole_stop, S * LANES * E):
        grad_SNE = tl.zeros((S, LANES, E), tl.float32)
        if first < stop:
            below_SNE = load_tile(student, first, stop, column_stride, S, E) - z_top
            if KD:
                log_q_SNE = below_SNE * z_factor - tl.load(z_log_sum + row)
                above_SNE = load_tile(teacher, first, stop, teacher_column_stride, S, E) - tl.load(t_max + row)
                _f_SNE, u_SNE = FORM(above_SNE * t_factor - tl.load(t_log_sum + row), log_q_SNE, parameter, rest)
                q_SNE = tl.exp2(log_q_SNE * IN_LOG2)
                grad_SNE = tl.load(kd + row) * (u_SNE - tl.load(u_total + row) * q_SNE)
            if CE:
                softmax_SNE = tl.exp2((below_SNE - tl.load(log_sum_at_one + row)) * IN_LOG2)
                is_label = tile_columns(S, E) == label - first
                grad_SNE += tl.load(ce + row) * tl.where(is_label, softmax_SNE - 1, softmax_SNE)
        store_tile(out, grad_SNE, first, stop, whole_stop, out_column_stride, S, E)
