"""The passes of dense_kd_loss over whole rows of both models' logits, a few rows at a time, in plain PyTorch.

Sizes: T tokens, W columns on this rank, of which the first `width` are real and the rest padding.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megakd.kernels.divergences import FORMS
from megakd.kernels.rows import finite, row_blocks


class Scale(NamedTuple):
    """One model's softmax: log-probability = (x - max) / temperature - log_sum; max raw, both float32 [T]."""

    max_T: Tensor
    log_sum_T: Tensor
    temperature: float

    def log_softmax(self, x: Tensor, rows) -> Tensor:
        """Overwrites raw logits of some rows with their log-probabilities."""
        x -= self.max_T[rows, None]
        if self.temperature != 1:
            x *= 1 / self.temperature
        x -= self.log_sum_T[rows, None]
        return x


def dense_record(
    student_TW: Tensor,
    teacher_TW: Tensor,
    label_columns_T: Tensor,
    supervised_T: Tensor,
    width: int,
    temperatures: tuple[float, float],
    divergence: str,
) -> Tensor:
    """One read of both: this rank's record [T, 7], float32.

    Lanes, with z = (student - its max) / its temperature and t likewise for the teacher: student max (raw); sum of
    e^z; teacher max; sum of e^t, NaN in a row that is not finite; the sum of e^t (t - z) for forward_kl, of e^z (z - t)
    for reverse_kl, 0 for others; label logit, -inf elsewhere; sum of exp(student - max) at temperature 1.

    Args:
        student_TW, teacher_TW: float32, bfloat16 or float16, any strides; padding and rows not supervised are not read.
        temperatures: the student's and the teacher's.
    """
    record_7T = student_TW.new_zeros((7, len(supervised_T)), dtype=torch.float32)
    record_7T[[0, 2, 5]] = -torch.inf
    if not width:
        return record_7T.T
    label_columns_T1 = label_columns_T.where(label_columns_T >= 0, width)[:, None]
    for rows, x, _ in row_blocks(student_TW, supervised_T, width, spare=True):
        record_7T[5, rows] = x.gather(1, label_columns_T1[rows])[:, 0]
        z, t = x[:, :width], teacher_TW[rows, :width].float()
        z_max, t_max = z.amax(1, keepdim=True), t.amax(1, keepdim=True)
        broken = t.amin(1).isinf() | ~(t_max[:, 0] < torch.inf)
        z, t = z - finite(z_max), t - t_max
        record_7T[6, rows] = z.exp().sum(1)
        z, t = z / temperatures[0], t / temperatures[1]
        e_z, e_t = z.exp(), t.exp()
        sums = z_max[:, 0], e_z.sum(1), t_max[:, 0], e_t.sum(1).masked_fill(broken, torch.nan)
        if divergence == "forward_kl":
            sums = *sums, (e_t * (t - z)).where(e_t > 0, 0).sum(1)
        elif divergence == "reverse_kl":
            sums = *sums, (e_z * (z - t)).where(e_z > 0, 0).sum(1)
        record_7T[: len(sums), rows] = torch.stack(sums)
    return record_7T.T


def dense_sums(
    student_TW: Tensor,
    teacher_TW: Tensor,
    supervised_T: Tensor,
    width: int,
    scales: tuple[Scale, Scale],
    divergence: str,
    parameter: float,
) -> Tensor:
    """Another read of both: sums of f and u of a divergence over this rank's columns, [T, 2], float32."""
    sums_T2 = student_TW.new_zeros((len(supervised_T), 2), dtype=torch.float32)
    for rows, x, _ in row_blocks(student_TW, supervised_T, width, spare=True):
        log_q = scales[0].log_softmax(x[:, :width], rows)
        log_p = scales[1].log_softmax(teacher_TW[rows, :width].to(torch.float32, copy=True), rows)
        f, u = FORMS[divergence](log_p, log_q, parameter)
        sums_T2[rows] = torch.stack([f.sum(1), u.sum(1)], 1)
    return sums_T2


def dense_backward(
    student_TW: Tensor,
    teacher_TW: Tensor,
    label_columns_T: Tensor,
    supervised_T: Tensor,
    width: int,
    scales: tuple[Scale, Scale],
    divergence: str,
    parameter: float,
    u_total_T: Tensor,
    kd_T: Tensor | None,
    at_one: Scale,
    ce_T: Tensor | None,
    out_TW: Tensor,
) -> None:
    """One read of both and one write: kd (u - U q) + ce (softmax - [label]), and 0 in padding and masked rows.

    Args:
        scales: the student's and the teacher's.
        u_total_T: U; kd_T, ce_T: factors of the two parts, None for a part that is not wanted; float32.
        at_one: the student's softmax at temperature 1.
        out_TW: written; may be `student_TW` itself.
    """
    owned_T1, label_columns_T1 = (label_columns_T >= 0)[:, None], label_columns_T.clamp(min=0)[:, None]
    for rows, x, spare in row_blocks(student_TW, supervised_T, width, spare=True) if width else ():
        x, grad, q_factor_T1 = x[:, :width], spare[:, :width].zero_(), 0
        if ce_T is not None:
            q_factor_T1 = ce_T[rows, None]
            if kd_T is None or scales[0].temperature != 1:
                grad += at_one.log_softmax(x.clone(), rows).exp_().mul_(q_factor_T1)
                q_factor_T1 = 0
        if kd_T is not None:
            log_q = scales[0].log_softmax(x, rows)
            log_p = scales[1].log_softmax(teacher_TW[rows, :width].to(torch.float32, copy=True), rows)
            u = log_p.exp_().neg_() if divergence == "forward_kl" else FORMS[divergence](log_p, log_q, parameter)[1]
            grad += u.mul_(kd_T[rows, None])
            grad += log_q.exp_().mul_(q_factor_T1 - (kd_T * u_total_T)[rows, None])
        if ce_T is not None:
            grad.scatter_add_(1, label_columns_T1[rows], -ce_T[rows, None].where(owned_T1[rows], 0))
        out_TW[rows, :width] = grad.to(out_TW.dtype)
    out_TW[:, width:] = 0
    if not supervised_T.all():
        out_TW[~supervised_T] = 0
