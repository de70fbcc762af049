"""The passes of dense_kd_loss over whole rows of both models' logits, a few rows at a time, in plain PyTorch.

Every step writes into a buffer that is there already: on a CPU a temporary tensor of this size can cost more than the
arithmetic.

Sizes: T tokens, W columns on this rank, of which the first `width` are real and the rest padding; B rows of a block.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megakd.kernels.divergences import entry_sums, f_and_u
from megakd.kernels.rows import block_bytes, finite, runs

LEAST = -200.0  # a log-probability that is as good as -inf in float32, and can be multiplied with 0
PIECE = 1 << 15  # elements: 128 KiB


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


def pairs(
    student_TW: Tensor, teacher_TW: Tensor, supervised_T: Tensor, width: int, spares: int
) -> Iterator[tuple[slice | Tensor, Tensor, ...]]:
    """Yields (rows, student, teacher, *spares): the supervised rows in order, a few at a time, float32 [B, width].

    The buffers are reused; the spare ones have no content. `rows` indexes the first axis of any [T, ...] tensor.
    """
    rows_per_block = max(2, block_bytes(student_TW) // (4 * max(1, width) * (2 + spares)))
    buffers = student_TW.new_empty((2 + spares, rows_per_block, width), dtype=torch.float32)
    for rows in runs(supervised_T, rows_per_block) if width else ():
        student_BW, teacher_BW = student_TW[rows, :width], teacher_TW[rows, :width]
        x, y, *spare = buffers[:, : len(student_BW)]
        yield rows, x.copy_(student_BW), y.copy_(teacher_BW), *spare


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
    for reverse_kl, of no use for others; label logit, -inf elsewhere; sum of exp(student - max) at temperature 1.

    Args:
        student_TW, teacher_TW: float32, bfloat16 or float16, any strides; padding and rows not supervised are not read.
        temperatures: the student's and the teacher's.
    """
    record_7T = student_TW.new_zeros((7, len(supervised_T)), dtype=torch.float32)
    record_7T[[0, 2, 5]] = -torch.inf
    owned_T, label_columns_T1 = label_columns_T >= 0, label_columns_T.clamp(min=0)[:, None]
    for rows, z, t, e in pairs(student_TW, teacher_TW, supervised_T, width, spares=1):
        label_B = z.gather(1, label_columns_T1[rows])[:, 0].where(owned_T[rows], -torch.inf)
        z_max, t_max = z.amax(1, keepdim=True), t.amax(1, keepdim=True)
        broken_B = ~t.sum(1).isfinite()
        if broken_B.any():  # or the sum of finite logits has overflowed
            broken_B = ~t.isfinite().all(1)
        z -= finite(z_max)
        t -= t_max
        at_one_B = None if temperatures[0] == 1 else torch.exp(z, out=e).sum(1)
        if temperatures != (1, 1):
            z *= 1 / temperatures[0]
            t *= 1 / temperatures[1]
        weighing, other = (z, t) if divergence == "reverse_kl" else (t, z)
        other_sum_B = torch.exp(other, out=e).sum(1)
        sum_B = torch.exp(weighing, out=e).sum(1)
        z_sum_B, t_sum_B = (sum_B, other_sum_B) if divergence == "reverse_kl" else (other_sum_B, sum_B)
        cross_B = weighted_gap(e, weighing, other) if divergence in ("forward_kl", "reverse_kl") else sum_B
        t_sum_B = t_sum_B.masked_fill(broken_B, torch.nan)
        lanes = z_max[:, 0], z_sum_B, t_max[:, 0], t_sum_B, cross_B, label_B, z_sum_B if at_one_B is None else at_one_B
        record_7T[:, rows] = torch.stack(lanes)
    return record_7T.T


def weighted_gap(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Sum over a row of weight (a - b), and of 0 where the weight is 0, whatever a and b are. Overwrites b."""
    total_B = torch.sub(a, b, out=b).mul_(weight).sum(1)
    return b.masked_fill_(weight == 0, 0).sum(1) if total_B.isnan().any() else total_B


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
    for rows, x, y in pairs(student_TW, teacher_TW, supervised_T, width, spares=0):
        logs = scales[1].log_softmax(y, rows), scales[0].log_softmax(x, rows)
        sums_T2[rows] = sum(entry_sums(divergence, *part, parameter) for part in pieces(*logs))
    return sums_T2


def u_and_q(divergence: str, log_p: Tensor, log_q: Tensor, parameter: float) -> tuple[Tensor, Tensor]:
    """u of each column (see `divergences`) and q; overwrites both."""
    if divergence == "forward_kl":  # the usual ones, without a temporary, and with one
        return log_p.exp_().neg_(), log_q.exp_()
    if divergence == "reverse_kl":
        q = log_q.clamp_(min=LEAST).exp()
        return log_q.sub_(log_p).mul_(q), q
    for part_of_p, part_of_q in pieces(log_p, log_q):
        part_of_p.copy_(f_and_u(divergence, part_of_p, part_of_q, parameter)[1])
    return log_p, log_q.exp_()


def pieces(*blocks: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same columns of each, few enough for the temporary tensors of a form to stay in a core's cache."""
    columns = max(1, PIECE // max(1, len(blocks[0])))
    return zip(*(block.split(columns, 1) for block in blocks), strict=True)


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
    apart = ce_T is not None and (kd_T is None or scales[0].temperature != 1)
    for rows, x, y, *spare in pairs(student_TW, teacher_TW, supervised_T, width, spares=int(apart)):
        if apart:
            softmax = at_one.log_softmax(spare[0].copy_(x), rows).exp_().mul_(ce_T[rows, None])
        grad = softmax if apart else None
        if kd_T is not None:
            log_q, log_p = scales[0].log_softmax(x, rows), scales[1].log_softmax(y, rows)
            u, q = u_and_q(divergence, log_p, log_q, parameter)
            q_factor_B = -kd_T[rows] * u_total_T[rows]
            if ce_T is not None and not apart:
                q_factor_B = q_factor_B + ce_T[rows]
            grad = u.mul_(kd_T[rows, None]).add_(q.mul_(q_factor_B[:, None]))
            if apart:
                grad += softmax
        if grad is None:
            grad = x.zero_()
        if ce_T is not None:
            grad.scatter_add_(1, label_columns_T1[rows], -ce_T[rows, None].where(owned_T1[rows], 0))
        if isinstance(rows, slice):
            out_TW[rows, :width].copy_(grad)
        else:
            out_TW[rows, :width] = grad.to(out_TW.dtype)
    out_TW[:, width:] = 0
    if not supervised_T.all():
        out_TW[~supervised_T] = 0
