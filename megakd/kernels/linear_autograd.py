"""The two autograd functions of linear_kd_loss: logits made again in the backward, or gradients made in the forward.

Sizes: T tokens, B tokens of a block, H hidden, W vocabulary columns on this rank, C some of them, K entries per token.
"""

import functools
import logging
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megakd.kernels.paths import row_passes
from megakd.kernels.records import build_record
from megakd.kernels.rows import Statistics, runs
from megakd.kernels.terms import Factors, KDLoss, Options, Saved, Supervised, evaluate, gradient_factors, localize
from megakd.kernels.vocab import VocabShard

LOGGER = logging.getLogger(__name__)


class Layout(NamedTuple):
    """What one call of the fused loss goes by."""

    shard: VocabShard
    options: Options
    sequence_parallel: bool
    into_main_grad: bool
    block_tokens: int


def whole(hidden_TH: Tensor, shard: VocabShard, sequence_parallel: bool) -> Tensor:
    """The hidden states of all T tokens: an all-gather if each rank has its T / R of them, otherwise what is given."""
    return shard.all_gather(hidden_TH).flatten(0, 1) if sequence_parallel else hidden_TH


class Blocks:
    """The logits of the supervised tokens, a block at a time in one reused buffer, and what becomes of them."""

    def __init__(self, hidden_TH: Tensor, weight_WH: Tensor, s: Supervised, layout: Layout):
        self.hidden_TH, self.weight_WH, self.s, self.layout = hidden_TH, weight_WH, s, layout
        size = min(layout.block_tokens, len(hidden_TH))
        self.buffer_BW = hidden_TH.new_empty((size, len(weight_WH)))
        self.all_on_B = torch.ones(size, dtype=torch.bool, device=hidden_TH.device)

    def zero_weight_gradient(self) -> Tensor:
        """Zeros [W, H] to which products are added: float32, unless one product is all there is to come."""
        single = len(self.hidden_TH) <= self.layout.block_tokens
        return torch.zeros_like(self.weight_WH, dtype=self.weight_WH.dtype if single else torch.float32)

    def __iter__(self) -> Iterator[tuple[slice | Tensor, Tensor]]:
        """Yields (rows, logits): `rows` indexes the first axis of any [T, ...] tensor."""
        for rows in runs(self.s.supervised_T, self.layout.block_tokens):
            hidden_BH = self.hidden_TH[rows]
            yield rows, torch.mm(hidden_BH, self.weight_WH.T, out=self.buffer_BW[: len(hidden_BH)])

    def arguments(self, rows, logits_BW: Tensor) -> tuple:
        """The arguments that `rows.statistics` and `rows.backward` share."""
        s, options = self.s.rows(rows), self.layout.options
        on_B = self.all_on_B[: len(logits_BW)]
        return logits_BW, s.columns_TK, s.label_columns_T, on_B, self.layout.shard.real_width, options.temperature

    def statistics(self, rows, logits_BW: Tensor) -> Statistics:
        """`rows.statistics` of one block."""
        return row_passes(logits_BW).statistics(*self.arguments(rows, logits_BW))

    def backward(
        self, rows, logits_BW: Tensor, factors: Factors, grad_TH: Tensor | None, grad_WH: Tensor | None
    ) -> None:
        """Overwrites the block's logits with their gradient, and adds the products with it to the two gradients."""
        row_passes(logits_BW).backward(*self.arguments(rows, logits_BW), *factors, logits_BW)
        width = self.layout.shard.real_width  # 0 times a padding weight that is not finite is not 0
        if grad_TH is not None:
            grad_TH[rows] = logits_BW[:, :width] @ self.weight_WH[:width]
        if grad_WH is not None:
            add_product(grad_WH[:width], logits_BW[:, :width], self.hidden_TH[rows])


def add_product(grad_WH: Tensor, logits_grad_BW: Tensor, hidden_BH: Tensor) -> None:
    """grad_WH += logits_grad_BW.T @ hidden_BH, in the dtype of grad_WH, with less memory than the logits take."""
    if grad_WH.dtype == logits_grad_BW.dtype:
        grad_WH.addmm_(logits_grad_BW.T, hidden_BH)
        return
    if adds_to_float32(grad_WH.device, hidden_BH.dtype):
        torch.addmm(grad_WH, logits_grad_BW.T, hidden_BH, out_dtype=torch.float32, out=grad_WH)
        return
    columns = max(1, logits_grad_BW.numel() // (4 * hidden_BH.shape[1]))  # a product, and on a CPU its float32 copy
    for grad_CH, part_BC in zip(grad_WH.split(columns), logits_grad_BW.split(columns, 1), strict=True):
        grad_CH += part_BC.T @ hidden_BH


@functools.cache
def adds_to_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch adds a product in this dtype to a float32 matrix in one step: on CUDA, in newer versions."""
    if device.type != "cuda" or "dtype_out" not in torch.ops.aten.addmm.overloads():
        return False
    factor, out = torch.ones((16, 16), dtype=dtype, device=device), torch.zeros((16, 16), device=device)
    try:
        torch.addmm(out, factor, factor, out_dtype=torch.float32, out=out)
    except RuntimeError as error:
        LOGGER.info("the output layer's gradient is added in two steps, because %s", error)
        return False
    return True


class Recompute(torch.autograd.Function):
    """Statistics of all blocks in the forward; their logits once more, and the gradients, in the backward."""

    @staticmethod
    def forward(ctx, hidden_TH, weight_WH, targets, labels_T, layout):
        options, s = layout.options, localize(targets, labels_T, layout.shard)
        blocks = Blocks(whole(hidden_TH, layout.shard, layout.sequence_parallel), weight_WH, s, layout)
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
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_T, *_):
        hidden_TH, weight_WH, entry_logits_TK, *rest = ctx.saved_tensors
        s, saved = Supervised(*rest[: len(Supervised._fields)]), Saved(*rest[len(Supervised._fields) :])
        layout = ctx.layout
        blocks = Blocks(whole(hidden_TH, layout.shard, layout.sequence_parallel), weight_WH, s, layout)
        grad_TH = torch.zeros_like(blocks.hidden_TH) if ctx.needs_input_grad[0] else None
        grad_WH = None
        if ctx.needs_input_grad[1]:
            grad_WH = ctx.weight.main_grad if layout.into_main_grad else blocks.zero_weight_gradient()
        for rows, logits_BW in blocks:
            part = grad_T[rows], entry_logits_TK[rows], s.rows(rows), saved.rows(rows)
            blocks.backward(rows, logits_BW, gradient_factors(*part, layout.options), grad_TH, grad_WH)
        if grad_TH is not None:
            grad_TH = layout.shard.sum_over_ranks(grad_TH, scatter=layout.sequence_parallel)
        if grad_WH is not None:
            grad_WH = hand_over(ctx.weight) if layout.into_main_grad else grad_WH.to(weight_WH.dtype)
        return grad_TH, grad_WH, None, None, None


class GradientInForward(torch.autograd.Function):
    """The gradients of the sum of token_weight * loss in the forward; a common factor in the backward."""

    @staticmethod
    def forward(ctx, hidden_TH, weight_WH, targets, labels_T, token_weight_T, layout):
        shard, options, s = layout.shard, layout.options, localize(targets, labels_T, layout.shard)
        blocks = Blocks(whole(hidden_TH, shard, layout.sequence_parallel), weight_WH, s, layout)
        grad_TH = torch.zeros_like(blocks.hidden_TH) if ctx.needs_input_grad[0] else None
        grad_WH = torch.zeros_like(weight_WH, dtype=torch.float32) if ctx.needs_input_grad[1] else None
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
            blocks.backward(rows, logits_BW, factors, grad_TH, grad_WH)
        if grad_TH is not None:
            grad_TH = shard.sum_over_ranks(grad_TH, scatter=layout.sequence_parallel)
        ctx.gradients, ctx.into_main_grad, ctx.weight = (grad_TH, grad_WH), layout.into_main_grad, weight_WH
        ctx.save_for_backward(s.supervised_T, token_weight_T)
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_T, *_):
        if ctx.gradients is None:
            raise RuntimeError("gradient_in_forward gives its gradients away once; there is no second backward")
        factor = common_factor(grad_T, *ctx.saved_tensors)
        (grad_TH, grad_WH), ctx.gradients = ctx.gradients, None
        if grad_TH is not None:
            grad_TH *= factor
        if grad_WH is not None and ctx.into_main_grad:
            ctx.weight.main_grad.add_(grad_WH, alpha=factor)
            grad_WH = hand_over(ctx.weight)
        elif grad_WH is not None:
            grad_WH = grad_WH.mul_(factor).to(ctx.weight.dtype)
        return grad_TH, grad_WH, None, None, None, None


def nothing(s: Supervised, options: Options) -> Statistics:
    """The statistics of rows that have not been read."""
    tokens, top_k = s.columns_TK.shape
    none_T = torch.full((tokens,), -torch.inf, device=s.columns_TK.device)
    sum_at_one_T = None if options.temperature == 1 else torch.zeros_like(none_T)
    return Statistics(none_T, torch.zeros_like(none_T), sum_at_one_T, none_T[:, None].repeat(1, top_k), none_T.clone())


def common_factor(grad_T: Tensor, supervised_T: Tensor, token_weight_T: Tensor) -> float:
    """The number by which the gradient of loss_T exceeds token_weight_T in the supervised rows.

    Raises:
        RuntimeError: there is no such number.
    """
    if not supervised_T.any():
        return 0.0
    grad_T, weight_T = grad_T[supervised_T].double(), token_weight_T[supervised_T].double()
    factor = (grad_T * weight_T).sum() / (weight_T * weight_T).sum().clamp(min=1e-300)
    if not (grad_T - factor * weight_T).abs().max() <= 1e-5 * factor.abs() * weight_T.abs().max():
        raise RuntimeError(
            "gradient_in_forward was told other token weights than those of the objective: the gradient of loss_T must "
            "be a multiple of token_weight_T"
        )
    return float(factor)


def hand_over(weight_WH: Tensor) -> Tensor | None:
    """What Megatron's hooks expect of a weight whose gradient has been added to main_grad: a gradient that is not read.

    It is read, and must be zero, where the weight is also the embedding (`zero_out_wgrad`).
    """
    if not hasattr(weight_WH, "grad_added_to_main_grad"):
        return None
    weight_WH.grad_added_to_main_grad = True
    return torch.zeros_like(weight_WH) if getattr(weight_WH, "zero_out_wgrad", False) else torch.empty_like(weight_WH)
