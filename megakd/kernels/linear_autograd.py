"""The two autograd functions of linear_kd_loss: logits made again in the backward, or gradients made in the forward.

Sizes: T tokens, B tokens of a block, H hidden, W vocabulary columns on this rank, C some of them, K entries per token.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megakd.kernels.checks import expect
from megakd.kernels.paths import row_passes, softcap_passes
from megakd.kernels.records import build_record
from megakd.kernels.rows import Statistics, runs
from megakd.kernels.terms import Factors, KDLoss, Options, Saved, Supervised, evaluate, gradient_factors, localize
from megakd.kernels.vocab import VocabShard

LOGGER = logging.getLogger(__name__)
Rows = slice | Tensor  # indexes the first axis of any [T, ...] tensor


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


def whole(hidden_TH: Tensor, shard: VocabShard, sequence_parallel: bool) -> Tensor:
    """The hidden states of all T tokens: an all-gather if each rank has its T / R of them, otherwise what is given."""
    return shard.all_gather(hidden_TH).flatten(0, 1) if sequence_parallel else hidden_TH


class Blocks:
    """The logits of the supervised tokens, a block at a time in one reused buffer, and what becomes of them.

    With a soft cap and gradients there are two buffers: the logits before the cap are what its derivative is made of.
    """

    def __init__(self, hidden_TH: Tensor, weight_WH: Tensor, s: Supervised, layout: Layout, *, gradients: bool):
        self.hidden_TH, self.weight_WH, self.s, self.layout = hidden_TH, weight_WH, s, layout
        self.rows = list(runs(s.supervised_T, layout.block_tokens, all_of_them=layout.all_supervised))
        size = min(layout.block_tokens, len(hidden_TH))
        self.raw_BW = hidden_TH.new_empty((size, len(weight_WH)))
        self.logits_BW = self.raw_BW if layout.softcap is None or not gradients else torch.empty_like(self.raw_BW)
        self.all_on_B = torch.ones(size, dtype=torch.bool, device=hidden_TH.device)

    def __iter__(self) -> Iterator[tuple[Rows, Tensor]]:
        """Yields (rows, logits)."""
        for rows in self.rows:
            hidden_BH = self.hidden_TH[rows]
            raw_BW, logits_BW = self.raw_BW[: len(hidden_BH)], self.logits_BW[: len(hidden_BH)]
            multiply(hidden_BH, self.weight_WH, raw_BW)
            if self.layout.softcap is not None:
                softcap_passes(raw_BW).cap(raw_BW, self.layout.softcap, logits_BW)
            yield rows, logits_BW

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

    def backward(self, rows: Rows, logits_BW: Tensor, factors: Factors, gradients: "Gradients") -> None:
        """Overwrites the block's logits with their gradient, and adds the products with it to the two gradients."""
        row_passes(logits_BW).backward(*self.arguments(rows, logits_BW), *factors, logits_BW)
        width = self.layout.shard.real_width  # 0 times a padding weight that is not finite is not 0
        grad_BW = logits_BW[:, :width]
        if self.layout.softcap is not None:
            softcap_passes(grad_BW).uncap(self.raw_BW[: len(grad_BW), :width], self.layout.softcap, grad_BW)
        gradients.add(rows, grad_BW, last=rows is self.rows[-1])


class Gradients:
    """The gradients of hidden states and weight, to which blocks add; either is None where nobody wants it.

    The hidden gradient's sum over the ranks starts as soon as the last block is in it, beside that block's product for
    the weight.
    """

    def __init__(self, blocks: Blocks, layout: Layout, grad_WH: Tensor | None, *, of_hidden: bool):
        self.blocks, self.layout, self.grad_WH = blocks, layout, grad_WH
        self.grad_TH = torch.zeros_like(blocks.hidden_TH) if of_hidden else None
        self.wait = None

    def add(self, rows: Rows, logits_grad_BW: Tensor, *, last: bool) -> None:
        """One block's part, from the gradient of its logits."""
        width = logits_grad_BW.shape[1]
        if self.grad_TH is not None:
            self.grad_TH[rows] = logits_grad_BW @ self.blocks.weight_WH[:width]
            if last:
                self.start()
        if self.grad_WH is not None:
            add_product(self.grad_WH[:width], logits_grad_BW, self.blocks.hidden_TH[rows])

    def start(self) -> None:
        """Nothing more is to be added to the hidden gradient."""
        self.wait = self.layout.shard.start_sum_over_ranks(self.grad_TH, scatter=self.layout.sequence_parallel)

    def finish(self) -> Tensor | None:
        """The gradient of the hidden states that this rank has been given."""
        if self.grad_TH is None:
            return None
        if self.wait is None:  # no block has been added
            self.start()
        return self.wait()


def multiply(hidden_BH: Tensor, weight_WH: Tensor, out_BW: Tensor) -> None:
    """out_BW = hidden_BH @ weight_WH.T; a library that sums up in float32 beside it takes no more than out_BW does.

    On CPUs without bfloat16 instructions oneDNN does so: twice the memory of a whole product in 16 bits.
    """
    columns = len(weight_WH)
    if out_BW.device.type == "cpu":
        columns = max(1, columns * out_BW.element_size() // 4)
    for part_CH, out_BC in zip(weight_WH.split(columns), out_BW.split(columns, 1), strict=True):
        torch.mm(hidden_BH, part_CH.T, out=out_BC)


def add_product(grad_WH: Tensor, logits_grad_BW: Tensor, hidden_BH: Tensor) -> None:
    """grad_WH += logits_grad_BW.T @ hidden_BH, in the dtype of grad_WH, with less memory than the logits take."""
    same = grad_WH.dtype == logits_grad_BW.dtype
    if not same and adds_to_float32(grad_WH.device, hidden_BH.dtype):
        torch.addmm(grad_WH, logits_grad_BW.T, hidden_BH, out_dtype=torch.float32, out=grad_WH)
        return
    columns = max(1, logits_grad_BW.numel() // (4 * hidden_BH.shape[1]))  # a product, and its sums in float32
    if same and (grad_WH.dtype == torch.float32 or grad_WH.device.type != "cpu"):
        columns = len(grad_WH)
    for grad_CH, part_BC in zip(grad_WH.split(columns), logits_grad_BW.split(columns, 1), strict=True):
        if same:
            grad_CH.addmm_(part_BC.T, hidden_BH)
        else:
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
            grad_WH = weight_gradient(ctx.weight, layout, single=len(whole_TH) <= layout.block_tokens)
        blocks = Blocks(whole_TH, weight_WH, s, layout, gradients=True)
        gradients = Gradients(blocks, layout, grad_WH, of_hidden=ctx.needs_input_grad[0])
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
            grad_WH = weight_gradient(weight_WH, layout, single=False)
        blocks = Blocks(whole_TH, weight_WH, s, layout, gradients=True)
        gradients = Gradients(blocks, layout, grad_WH, of_hidden=ctx.needs_input_grad[0])
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
        ctx.gradients, ctx.weight = (gradients.finish(), grad_WH), weight_WH
        ctx.into_main_grad = layout.into_main_grad and grad_WH is not None
        ctx.save_for_backward(s.supervised_T, token_weight_T)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)  # no zeros for the outputs without a gradient
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_T, *_):
        if ctx.gradients is None:
            raise RuntimeError("gradient_in_forward gives its gradients away once; there is no second backward")
        supervised_T, token_weight_T = ctx.saved_tensors
        grad_T = torch.zeros_like(token_weight_T) if grad_T is None else grad_T
        factor = common_factor(grad_T, supervised_T, token_weight_T, is_one=ctx.into_main_grad)
        (grad_TH, grad_WH), ctx.gradients = ctx.gradients, None
        if ctx.into_main_grad:
            return grad_TH, hand_over(ctx.weight), None, None, None, None
        if grad_TH is not None:
            grad_TH *= factor
        if grad_WH is not None:
            grad_WH = grad_WH.mul_(factor).to(ctx.weight.dtype)
        return grad_TH, grad_WH, None, None, None, None


def weight_gradient(weight_WH: Tensor, layout: Layout, *, single: bool) -> Tensor:
    """[W, H] to which products are added: main_grad, or zeros in float32, unless a single product is all there is."""
    if layout.into_main_grad:
        return weight_WH.main_grad
    return torch.zeros_like(weight_WH, dtype=weight_WH.dtype if single else torch.float32)


def nothing(s: Supervised, options: Options) -> Statistics:
    """The statistics of rows that have not been read."""
    tokens, top_k = s.columns_TK.shape
    none_T = torch.full((tokens,), -torch.inf, device=s.columns_TK.device)
    sum_at_one_T = None if options.temperature == 1 else torch.zeros_like(none_T)
    return Statistics(none_T, torch.zeros_like(none_T), sum_at_one_T, none_T[:, None].repeat(1, top_k), none_T.clone())


def common_factor(grad_T: Tensor, supervised_T: Tensor, token_weight_T: Tensor, *, is_one: bool) -> Tensor:
    """The number by which the gradient of loss_T exceeds token_weight_T in the supervised rows; float64 [].

    Raises:
        RuntimeError: there is no such number, or it must be 1 and is not (see `checks.expect`).
    """
    if not len(grad_T):
        return grad_T.new_zeros((), dtype=torch.float64)
    grad_T, weight_T = (x_T.double().where(supervised_T, 0) for x_T in (grad_T, token_weight_T))
    square = weight_T.square().sum()
    factor = (grad_T * weight_T).sum() / square.clamp(min=1e-300)
    fits = (grad_T - factor * weight_T).abs().amax() <= 1e-5 * factor.abs() * weight_T.abs().amax()
    message = (
        "gradient_in_forward was told other token weights than those of the objective: the gradient of loss_T must "
        "be a multiple of token_weight_T"
    )
    if is_one:
        fits &= ((factor - 1).abs() <= 1e-5) | (square == 0)
        message += ", and where it went into main_grad, token_weight_T itself"

    def explain():
        raise RuntimeError(message)

    expect(fits, "gradient_in_forward was told other token weights than those of the objective", explain)
    return factor


def hand_over(weight_WH: Tensor) -> Tensor | None:
    """What Megatron's hooks expect of a weight whose gradient has been added to main_grad: a gradient that is not read.

    It is read, and must be zero, where the weight is also the embedding (`zero_out_wgrad`).
    """
    if not hasattr(weight_WH, "grad_added_to_main_grad"):
        return None
    weight_WH.grad_added_to_main_grad = True
    return torch.zeros_like(weight_WH) if getattr(weight_WH, "zero_out_wgrad", False) else torch.empty_like(weight_WH)
