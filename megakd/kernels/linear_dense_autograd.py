"""The two autograd functions of linear_dense_kd_loss: logits made again in the backward, or gradients in the forward.

Sizes: T tokens, B tokens of a block, H and G hidden of student and teacher, W vocabulary columns on this rank, R ranks.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megakd.kernels import dense
from megakd.kernels.dense import Both, dense_passes
from megakd.kernels.divergences import mixes
from megakd.kernels.head import (
    Gradients,
    Head,
    Rows,
    give_gradients,
    hand_over,
    keep_gradients,
    weight_gradient,
    whole,
)
from megakd.kernels.rows import runs
from megakd.kernels.terms import KDLoss, Options
from megakd.kernels.vocab import MASKED, VocabShard


class PairLayout(NamedTuple):
    """What one call of the loss of two output layers goes by."""

    shard: VocabShard
    options: Options
    temperatures: tuple[float, float]  # of student and teacher
    sequence_parallel: bool
    all_supervised: bool
    into_main_grad: bool
    block_tokens: int
    softcaps: tuple[float | None, float | None]
    on_logits: Callable[[Rows, Tensor, Tensor], None] | None


class Pairs:
    """Both models' logits of the supervised tokens, a block at a time, and what becomes of them.

    The last block is still there when the next pass begins, which therefore begins with it.
    """

    def __init__(
        self, hidden: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor], labels_T: Tensor, layout: PairLayout,
        *, gradients: bool,
    ):  # fmt: skip
        heads = zip(hidden, weights, layout.softcaps, (gradients, False), strict=True)
        self.student, self.teacher = (
            Head(whole(x, layout.shard, layout.sequence_parallel), weight, layout.block_tokens, softcap, gradients=own)
            for x, weight, softcap, own in heads
        )
        self.layout, self.supervised_T = layout, labels_T != MASKED
        self.label_columns_T = layout.shard.columns(labels_T)
        self.rows = list(runs(self.supervised_T, layout.block_tokens, all_of_them=layout.all_supervised))
        self.all_on_B = torch.ones(len(self.student.raw_BW), dtype=torch.bool, device=labels_T.device)
        self.held = None

    def __iter__(self) -> Iterator[tuple[Rows, tuple[Tensor, Tensor]]]:
        """Yields (rows, both models' logits)."""
        for rows in self.rows if self.held is None else list(reversed(self.rows)):
            if rows is not self.held:
                self.logits = self.student.logits(rows), self.teacher.logits(rows)
                self.held = rows
            yield rows, self.logits

    def record(self, rows: Rows, logits: tuple[Tensor, Tensor]) -> Tensor:
        """`dense_record` of one block, after showing its logits to `on_logits`."""
        layout = self.layout
        if layout.on_logits is not None:
            layout.on_logits(rows, *logits)
        given = *self.of_rows(rows, logits), layout.temperatures, layout.options.divergence
        return dense_passes(logits[0]).dense_record(*logits, *given)

    def of_rows(self, rows: Rows, logits: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, int]:
        """Label columns, supervised rows and the real width, as the passes take them."""
        return self.label_columns_T[rows], self.all_on_B[: len(logits[0])], self.layout.shard.real_width

    def sums(self, rows: Rows, logits: tuple[Tensor, Tensor], both_B: Both) -> Tensor:
        """`dense_sums` of one block."""
        layout, options = self.layout, self.layout.options
        given = *self.of_rows(rows, logits)[1:], both_B.scales(layout.temperatures)
        return dense_passes(logits[0]).dense_sums(*logits, *given, options.divergence, options.parameter)

    def backward(
        self, rows: Rows, logits: tuple[Tensor, Tensor], both_B: Both, u_total_B: Tensor, grad_B: Tensor,
        gradients: Gradients, *, last: bool,
    ) -> None:  # fmt: skip
        """Overwrites the student's logits with their gradient, and adds the products with it to the two gradients."""
        layout, given = self.layout, (self.of_rows(rows, logits), both_B, u_total_B, grad_B)
        dense.backward(*logits, *given, layout.options, layout.temperatures, logits[0])
        self.held = None
        grad_BW = logits[0][:, : layout.shard.real_width]  # 0 times a padding weight that is not finite is not 0
        self.student.uncap(grad_BW)
        gradients.add(rows, grad_BW, last=last)

    def gradients(self, grad_WH: Tensor | None, *, of_hidden: bool) -> Gradients:
        """To which `backward` adds."""
        scatter = self.layout.sequence_parallel
        return Gradients(self.student, self.layout.shard, grad_WH, of_hidden=of_hidden, scatter=scatter)


class RecomputePairs(torch.autograd.Function):
    """Records of all blocks in the forward; their logits once more, and the gradients, in the backward."""

    @staticmethod
    def forward(ctx, hidden_TH, weight_WH, teacher_hidden_TG, teacher_weight_WG, labels_T, layout):
        shard, options = layout.shard, layout.options
        inputs = (hidden_TH, teacher_hidden_TG), (weight_WH, teacher_weight_WG), labels_T
        pairs = Pairs(*inputs, layout, gradients=False)
        record_T7 = torch.zeros((len(labels_T), 7), device=labels_T.device)
        for rows, logits in pairs:
            record_T7[rows] = pairs.record(rows, logits)
        both, sums_RT2 = dense.merge(shard.all_gather(record_T7), layout.temperatures, options.divergence), None
        if mixes(options.divergence):
            sums_T2 = record_T7.new_zeros((len(labels_T), 2))
            for rows, logits in pairs:
                sums_T2[rows] = pairs.sums(rows, logits, both.rows(rows))
            sums_RT2 = shard.all_gather(sums_T2)
        outputs, u_total_T = dense.evaluate(both, sums_RT2, pairs.supervised_T, labels_T, shard, options)
        ctx.save_for_backward(hidden_TH, weight_WH, teacher_hidden_TG, teacher_weight_WG, labels_T, u_total_T, *both)
        ctx.layout, ctx.weight = layout, weight_WH
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)  # no zeros for the outputs without a gradient
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_T, *_):
        if grad_T is None:
            return (None,) * len(ctx.needs_input_grad)
        hidden_TH, weight_WH, teacher_hidden_TG, teacher_weight_WG, labels_T, u_total_T, *both = ctx.saved_tensors
        layout, both, grad_WH = ctx.layout, Both(*both), None
        if ctx.needs_input_grad[1]:
            single = len(labels_T) <= layout.block_tokens
            grad_WH = weight_gradient(ctx.weight, single=single, into_main_grad=layout.into_main_grad)
        inputs = (hidden_TH, teacher_hidden_TG), (weight_WH, teacher_weight_WG), labels_T
        pairs = Pairs(*inputs, layout, gradients=True)
        gradients = pairs.gradients(grad_WH, of_hidden=ctx.needs_input_grad[0])
        for rows, logits in pairs:
            given = both.rows(rows), u_total_T[rows], grad_T[rows], gradients
            pairs.backward(rows, logits, *given, last=rows is pairs.rows[-1])
        if grad_WH is not None:
            grad_WH = hand_over(ctx.weight) if layout.into_main_grad else grad_WH.to(weight_WH.dtype)
        return gradients.finish(), grad_WH, None, None, None, None


class PairGradientInForward(torch.autograd.Function):
    """The gradients of the sum of token_weight * loss in the forward; a common factor in the backward."""

    @staticmethod
    def forward(ctx, hidden_TH, weight_WH, teacher_hidden_TG, teacher_weight_WG, labels_T, token_weight_T, layout):
        shard, options, grad_WH = layout.shard, layout.options, None
        if ctx.needs_input_grad[1]:
            grad_WH = weight_gradient(weight_WH, single=False, into_main_grad=layout.into_main_grad)
        inputs = (hidden_TH, teacher_hidden_TG), (weight_WH, teacher_weight_WG), labels_T
        pairs = Pairs(*inputs, layout, gradients=True)
        gradients = pairs.gradients(grad_WH, of_hidden=ctx.needs_input_grad[0])
        outputs = KDLoss(*(token_weight_T.new_zeros(len(labels_T), dtype=torch.float32) for _ in KDLoss._fields))
        numbers_T = torch.arange(len(labels_T), device=labels_T.device)
        for rows, logits in pairs:
            records_RB7 = shard.all_gather(pairs.record(rows, logits))
            both_B = dense.merge(records_RB7, layout.temperatures, options.divergence)
            sums_RB2 = shard.all_gather(pairs.sums(rows, logits, both_B)) if mixes(options.divergence) else None
            given = pairs.of_rows(rows, logits)[1], labels_T[rows], shard, options, numbers_T[rows]
            results, u_total_B = dense.evaluate(both_B, sums_RB2, *given)
            for all_T, block_B in zip(outputs, results, strict=True):
                all_T[rows] = block_B
            last = rows is pairs.rows[-1]
            pairs.backward(rows, logits, both_B, u_total_B, token_weight_T[rows], gradients, last=last)
        keep_gradients(ctx, gradients, weight_WH, layout.into_main_grad, pairs.supervised_T, token_weight_T)
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_T, *_):
        return *give_gradients(ctx, grad_T), None, None, None, None, None
