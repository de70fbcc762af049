"""The two autograd functions of linear_kd_loss: logits made again in the backward, or gradients made in the forward.

Sizes: T tokens, B tokens of a block, H hidden, W vocabulary columns on this rank, K entries per token.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
from megakd.kernels.paths import row_passes
from megakd.kernels.records import build_record
from megakd.kernels.rows import Statistics, runs
from megakd.kernels.terms import Factors, KDLoss, Options, Saved, Supervised, evaluate, gradient_factors, localize
from megakd.kernels.vocab import VocabShard


class Layout(NamedTuple):
    """What one call of the fused loss goes by."""

    shard: VocabShard
    options: Options
    sequence_parallel: bool
    all_supervised: bool
    into_main_grad: bool
    block_tokens: int
    softcap: float | None
    on_logits: Callable[[Rows, Tensor], None] | None


class Blocks:
    """The logits of the supervised tokens, a block at a time, and what becomes of them."""

    def __init__(self, hidden_TH: Tensor, weight_WH: Tensor, s: Supervised, layout: Layout, *, gradients: bool):
        self.head = Head(hidden_TH, weight_WH, layout.block_tokens, layout.softcap, gradients=gradients)
        self.s, self.layout = s, layout
        self.rows = list(runs(s.supervised_T, layout.block_tokens, all_of_them=layout.all_supervised))
        self.all_on_B = torch.ones(len(self.head.raw_BW), dtype=torch.bool, device=hidden_TH.device)

    def __iter__(self) -> Iterator[tuple[Rows, Tensor]]:
        """Yields (rows, logits)."""
        for rows in self.rows:
            yield rows, self.head.logits(rows)

    def arguments(self, rows: Rows, logits_BW: Tensor) -> tuple:
        """The arguments that `rows.statistics` and `rows.backward` share."""
        s, options = self.s.rows(rows), self.layout.options
        on_B = self.all_on_B[: len(logits_BW)]
        return logits_BW, s.columns_TK, s.label_columns_T, on_B, self.layout.shard.real_width, options.temperature

    def statistics(self, rows: Rows, logits_BW: Tensor) -> Statistics:
        """`rows.statistics` of one block, after showing its logits to `on_logits`."""
        if self.layout.on_logits is not None:
            self.layout.on_logits(rows, logits_BW)
        return row_passes(logits_BW).statistics(*self.arguments(rows, logits_BW))

    def backward(self, rows: Rows, logits_BW: Tensor, factors: Factors, gradients: Gradients) -> None:
        """Overwrites the block's logits with their gradient, and adds the products with it to the two gradients."""
        row_passes(logits_BW).backward(*self.arguments(rows, logits_BW), *factors, logits_BW)
        grad_BW = logits_BW[:, : self.layout.shard.real_width]  # 0 times a padding weight that is not finite is not 0
        self.head.uncap(grad_BW)
        gradients.add(rows, grad_BW, last=rows is self.rows[-1])


class Recompute(torch.autograd.Function):
    """Statistics of all blocks in the forward; their logits once more, and the gradients, in the backward."""

    @staticmethod
    def forward(ctx, hidden_TH, weight_WH, targets, labels_T, layout):
        options, s = layout.options, localize(targets, labels_T, layout.shard)
        whole_TH = whole(hidden_TH, layout.shard, layout.sequence_parallel)
        blocks = Blocks(whole_TH, weight_WH, s, layout, gradients=False)
        stats = nothing(s, options)
        for rows, logits_BW in blocks:
            for all_T, block_B in zip(stats, blocks.statistics(rows, logits_BW), strict=True):
                if all_T is not None:
                    all_T[rows] = block_B
        record_TL = build_record(stats, s.logprobs_TK, options.temperature, sampled=options.sampled)
        outputs, saved = evaluate(record_TL, stats.entry_logits_TK, s, targets, labels_T, layout.shard, options)
        ctx.save_for_backward(hidden_TH, weight_WH, stats.entry_logits_TK, *s, *saved)
        ctx.layout, ctx.weight = layout, weight_WH
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)  # no zeros for the outputs without a gradient
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_T, *_):
        if grad_T is None:
            return (None,) * len(ctx.needs_input_grad)
        hidden_TH, weight_WH, entry_logits_TK, *rest = ctx.saved_tensors
        s, saved = Supervised(*rest[: len(Supervised._fields)]), Saved(*rest[len(Supervised._fields) :])
        layout, grad_WH = ctx.layout, None
        whole_TH = whole(hidden_TH, layout.shard, layout.sequence_parallel)
        if ctx.needs_input_grad[1]:
            grad_WH = weight_gradient(
                ctx.weight, single=len(whole_TH) <= layout.block_tokens, into_main_grad=layout.into_main_grad
            )
        blocks = Blocks(whole_TH, weight_WH, s, layout, gradients=True)
        gradients = Gradients(
            blocks.head, layout.shard, grad_WH, of_hidden=ctx.needs_input_grad[0], scatter=layout.sequence_parallel
        )
        for rows, logits_BW in blocks:
            part = grad_T[rows], entry_logits_TK[rows], s.rows(rows), saved.rows(rows)
            blocks.backward(rows, logits_BW, gradient_factors(*part, layout.options), gradients)
        if grad_WH is not None:
            grad_WH = hand_over(ctx.weight) if layout.into_main_grad else grad_WH.to(weight_WH.dtype)
        return gradients.finish(), grad_WH, None, None, None


class GradientInForward(torch.autograd.Function):
    """The gradients of the sum of token_weight * loss in the forward; a common factor in the backward."""

    @staticmethod
    def forward(ctx, hidden_TH, weight_WH, targets, labels_T, token_weight_T, layout):
        shard, options, s, grad_WH = layout.shard, layout.options, localize(targets, labels_T, layout.shard), None
        whole_TH = whole(hidden_TH, shard, layout.sequence_parallel)
        if ctx.needs_input_grad[1]:
            grad_WH = weight_gradient(weight_WH, single=False, into_main_grad=layout.into_main_grad)
        blocks = Blocks(whole_TH, weight_WH, s, layout, gradients=True)
        gradients = Gradients(
            blocks.head, layout.shard, grad_WH, of_hidden=ctx.needs_input_grad[0], scatter=layout.sequence_parallel
        )
        outputs = KDLoss(*(token_weight_T.new_zeros(len(labels_T), dtype=torch.float32) for _ in KDLoss._fields))
        numbers_T = torch.arange(len(labels_T), device=labels_T.device)
        for rows, logits_BW in blocks:
            stats, part = blocks.statistics(rows, logits_BW), s.rows(rows)
            record_TL = build_record(stats, part.logprobs_TK, options.temperature, sampled=options.sampled)
            given = part, targets.rows(rows), labels_T[rows], shard, options, numbers_T[rows]
            results, saved = evaluate(record_TL, stats.entry_logits_TK, *given)
            for all_T, block_B in zip(outputs, results, strict=True):
                all_T[rows] = block_B
            factors = gradient_factors(token_weight_T[rows], stats.entry_logits_TK, part, saved, options)
            blocks.backward(rows, logits_BW, factors, gradients)
        keep_gradients(ctx, gradients, weight_WH, layout.into_main_grad, s.supervised_T, token_weight_T)
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_T, *_):
        return *give_gradients(ctx, grad_T), None, None, None, None


def nothing(s: Supervised, options: Options) -> Statistics:
    """The statistics of rows that have not been read."""
    tokens, top_k = s.columns_TK.shape
    none_T = torch.full((tokens,), -torch.inf, device=s.columns_TK.device)
    sum_at_one_T = None if options.temperature == 1 else torch.zeros_like(none_T)
    return Statistics(none_T, torch.zeros_like(none_T), sum_at_one_T, none_T[:, None].repeat(1, top_k), none_T.clone())
