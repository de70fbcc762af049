"""dense_kd_loss: the exact divergence of two models whose logits are both at hand, split alike over ranks.

1. One read of both models' logits gives a record of 7 floats per token, all-gathered and merged in rank order; forward
   and reverse KL are then known. Divergences that mix P and Q read once more for two sums.
2. The backward reads both again and writes the gradient, in place if asked. It sends nothing.

Sizes: T tokens, W vocabulary columns on this rank, R ranks.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megakd.divergences import find
from megakd.kernels import divergences, paths
from megakd.kernels.checks import expect
from megakd.kernels.dense_rows import Scale
from megakd.kernels.rows import finite
from megakd.kernels.terms import (
    KDLoss,
    Options,
    check_inplace,
    check_labels,
    explain_stray,
    find_stray,
    row_number,
    total,
)
from megakd.kernels.vocab import MASKED, VocabShard

ROWS_MESSAGE = "a label is outside the vocabulary, or the teacher's logits are not finite"


class NotFiniteError(ValueError):
    """Of a teacher's logits."""


def dense_kd_loss(
    student_logits_TW: Tensor,
    teacher_logits_TW: Tensor,
    labels_T: Tensor,
    shard: VocabShard,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    student_temperature: float | None = None,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    inplace_backward: bool = False,
    **parameters: float,
) -> KDLoss:
    """Distillation over the whole vocabulary, without choosing entries; what `kd_loss` gives with K = V.

    Args:
        student_logits_TW: float32, bfloat16 or float16, not divided by a temperature.
        teacher_logits_TW: likewise, of the same shard; gets no gradient. Not modified.
        labels_T, shard, divergence, kd_weight, ce_weight, inplace_backward, parameters: as in `kd_loss`.
        temperature: of both models, unless `student_temperature` says otherwise for the student.
    Returns:
        KDLoss; both masses are 1.
    Raises:
        ValueError: shapes (two models whose vocabularies are padded to different widths), dtypes or names that do not
            fit; a label outside the vocabulary; a supervised row of the teacher that is not finite.
    Collectives: all-gather of 7 floats per token and rank, and for every divergence but forward_kl and reverse_kl of 2
        more; none in the backward.
    Source: as `kd_loss`.
    """
    shard.check_logits(student_logits_TW, "student logits")
    shard.check_logits(teacher_logits_TW, "teacher logits")
    check_inplace(student_logits_TW, inplace_backward)
    check_labels(labels_T, len(student_logits_TW), len(teacher_logits_TW))
    options, temperatures = build_options(
        divergence, parameters, temperature, student_temperature, kd_weight, ce_weight
    )
    return KDLoss(
        *_DenseKDLoss.apply(
            student_logits_TW, teacher_logits_TW.detach(), labels_T, shard, options, temperatures, inplace_backward
        )
    )


def build_options(
    divergence: str,
    parameters: dict[str, float],
    temperature: float,
    student_temperature: float | None,
    kd_weight: float,
    ce_weight: float,
) -> tuple[Options, tuple[float, float]]:
    """The loss's options, and the temperatures of student and teacher. Raises ValueError for what they cannot be."""
    parameter = find(divergence).check_parameter(parameters)
    temperatures = float(temperature if student_temperature is None else student_temperature), float(temperature)
    if not all(0 < each < float("inf") for each in temperatures):
        raise ValueError(f"temperatures must be positive numbers, not {temperatures[1]} and {temperatures[0]}")
    return Options(
        divergence, "bucket", parameter, temperatures[0], float(kd_weight), float(ce_weight), False
    ), temperatures


class Both(NamedTuple):
    """Both models over the whole vocabulary; [T], identical on every rank; float64, or float32 where that is enough."""

    student_max_T: Tensor
    student_log_sum_T: Tensor
    teacher_max_T: Tensor
    teacher_log_sum_T: Tensor
    log_sum_at_one_T: Tensor
    kd_T: Tensor  # of forward and reverse KL
    ce_T: Tensor

    def rows(self, rows: slice | Tensor) -> "Both":
        """Of some tokens."""
        return Both(*(part_T[rows] for part_T in self))

    def scales(self, temperatures: tuple[float, float]) -> tuple[Scale, Scale]:
        """The softmax of the student and of the teacher."""
        student = Scale(self.student_max_T.float(), self.student_log_sum_T.float(), temperatures[0])
        return student, Scale(self.teacher_max_T.float(), self.teacher_log_sum_T.float(), temperatures[1])


def merge(records_RT7: Tensor, temperatures: tuple[float, float], divergence: str) -> Both:
    """The records of all ranks as one; see `dense_rows.dense_record` for the lanes."""
    if fused := steps(records_RT7):
        return Both(*fused.merge(records_RT7, temperatures, divergence))
    student_max_RT, student_RT, teacher_max_RT, teacher_RT, cross_RT, label_RT, at_one_RT = records_RT7.double().unbind(
        2
    )
    student_max_T, teacher_max_T = finite(student_max_RT.amax(0)), finite(teacher_max_RT.amax(0))
    at_one_gap_RT = student_max_RT - student_max_T
    student_gap_RT, teacher_gap_RT = at_one_gap_RT / temperatures[0], (teacher_max_RT - teacher_max_T) / temperatures[1]
    log_student_T = (student_RT * student_gap_RT.exp()).sum(0).log()
    log_teacher_T = (teacher_RT * teacher_gap_RT.exp()).sum(0).log()
    log_at_one_T = (at_one_RT * at_one_gap_RT.exp()).sum(0).log()
    apart_RT = finite(teacher_gap_RT) - finite(student_gap_RT)
    if divergence == "forward_kl":
        sum_T = (teacher_gap_RT.exp() * (cross_RT + teacher_RT * apart_RT)).sum(0)
        kd_T = sum_T / log_teacher_T.exp() - log_teacher_T + log_student_T
    else:
        sum_T = (student_gap_RT.exp() * (cross_RT - student_RT * apart_RT)).sum(0)
        kd_T = sum_T / log_student_T.exp() - log_student_T + log_teacher_T
    ce_T = log_at_one_T - (label_RT.amax(0) - student_max_T)
    return Both(student_max_T, log_student_T, teacher_max_T, log_teacher_T, log_at_one_T, kd_T, ce_T)


def evaluate(
    both: Both,
    sums_RT2: Tensor | None,
    supervised_T: Tensor,
    labels_T: Tensor,
    shard: VocabShard,
    options: Options,
    numbers_T: Tensor | None = None,
) -> tuple[KDLoss, Tensor]:
    """The outputs of the loss, and U.

    Args:
        sums_RT2: of all ranks; None unless the divergence mixes P and Q.
        numbers_T: the rows' numbers for messages; None: 0, 1, ...
    Raises:
        ValueError: see `check_rows`.
    """
    if fused := steps(labels_T):
        outputs, u_total_T, fine_T = fused.total(
            both.kd_T, both.ce_T, both.teacher_log_sum_T, sums_RT2, supervised_T, labels_T, shard.size,
            options.divergence, (options.kd_weight, options.ce_weight), options.temperature,
        )  # fmt: skip
        expect(fine_T, ROWS_MESSAGE, lambda: check_rows(both, supervised_T, labels_T, shard, numbers_T))
        return KDLoss(*outputs), u_total_T
    check_rows(both, supervised_T, labels_T, shard, numbers_T)
    kd_T, whole_T = both.kd_T, torch.ones_like(both.kd_T)
    u_total_T = -whole_T if options.divergence == "forward_kl" else kd_T
    if sums_RT2 is not None:
        kd_T, u_total_T = sums_RT2.double().sum(0).unbind(1)
    return total(kd_T, both.ce_T, whole_T, whole_T, supervised_T, options), u_total_T.float()


def steps(x: Tensor) -> ModuleType | None:
    """The module with `merge` and `total` in Triton, where that reads the logits."""
    return paths.fused(x, "megakd.kernels.triton.dense_terms")


def backward(
    student_TW: Tensor,
    teacher_TW: Tensor,
    of_rows: tuple[Tensor, Tensor, int],
    both: Both,
    u_total_T: Tensor,
    grad_T: Tensor,
    options: Options,
    temperatures: tuple[float, float],
    out_TW: Tensor,
) -> None:
    """Writes the gradient of the student's logits to `out_TW`, which may be these logits.

    Args:
        of_rows: label columns, supervised rows, and the real width, as for the passes.
        both, u_total_T: of the forward. grad_T: that of loss_T.
    """
    dense_passes(student_TW).dense_backward(
        student_TW,
        teacher_TW,
        *of_rows,
        both.scales(temperatures),
        options.divergence,
        options.parameter,
        u_total_T,
        options.kd_weight * options.temperature * grad_T if options.kd_weight else None,
        Scale(both.student_max_T.float(), both.log_sum_at_one_T.float(), 1.0),
        options.ce_weight * grad_T if options.ce_weight else None,
        out_TW,
    )


def check_rows(
    both: Both, supervised_T: Tensor, labels_T: Tensor, shard: VocabShard, numbers_T: Tensor | None = None
) -> None:
    """On every rank alike; see `checks.expect`.

    Raises:
        ValueError: a label outside the vocabulary, or a supervised row of the teacher that is not finite.
    """
    stray_T, broken_T = find_stray(labels_T, supervised_T, shard), supervised_T & both.teacher_log_sum_T.isnan()

    def explain():
        explain_stray(stray_T, labels_T, shard, numbers_T)
        raise NotFiniteError(
            f"the teacher's logits hold NaN or infinity in {int(broken_T.sum())} of {len(broken_T)} rows, first in row "
            f"{row_number(int(broken_T.nonzero()[0]), numbers_T)}"
        )

    expect(~(stray_T | broken_T), ROWS_MESSAGE, explain)


def dense_passes(student_TW: Tensor) -> ModuleType:
    """The module with `dense_record`, `dense_sums` and `dense_backward` for these logits."""
    return paths.choose(student_TW, "megakd.kernels.dense_rows", "megakd.kernels.triton.dense_rows")


class _DenseKDLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_TW, teacher_TW, labels_T, shard, options, temperatures, inplace_backward):
        supervised_T, label_columns_T = labels_T != MASKED, shard.columns(labels_T)
        rows, width, divergence = (student_TW, teacher_TW), shard.real_width, options.divergence
        passes = dense_passes(student_TW)
        record_T7 = passes.dense_record(*rows, label_columns_T, supervised_T, width, temperatures, divergence)
        both = merge(shard.all_gather(record_T7), temperatures, divergence)
        sums_RT2 = None
        if divergences.mixes(divergence):
            given = supervised_T, width, both.scales(temperatures), divergence, options.parameter
            sums_RT2 = shard.all_gather(passes.dense_sums(*rows, *given))
        outputs, u_total_T = evaluate(both, sums_RT2, supervised_T, labels_T, shard, options)
        ctx.save_for_backward(student_TW, teacher_TW, supervised_T, label_columns_T, u_total_T, *both)
        ctx.shard, ctx.options, ctx.temperatures, ctx.inplace = shard, options, temperatures, inplace_backward
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)  # no zeros for the outputs without a gradient
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_T, *_):
        if grad_T is None:
            return (None,) * len(ctx.needs_input_grad)
        student_TW, teacher_TW, supervised_T, label_columns_T, u_total_T, *both = ctx.saved_tensors
        both, options = Both(*both), ctx.options
        out_TW = student_TW.detach() if ctx.inplace else torch.empty_like(student_TW)
        of_rows = label_columns_T, supervised_T, ctx.shard.real_width
        backward(student_TW, teacher_TW, of_rows, both, u_total_T, grad_T, options, ctx.temperatures, out_TW)
        return out_TW, None, None, None, None, None, None
