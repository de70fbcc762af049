"""What the fused losses share: an output layer applied block by block, and the two gradients that blocks add to.

Sizes: T tokens, B tokens of a block, H hidden, W vocabulary columns on this rank, C some of them.
"""

import functools
import logging

import torch
from torch import Tensor

from megakd.kernels.checks import expect
from megakd.kernels.paths import softcap_passes
from megakd.kernels.vocab import VocabShard

LOGGER = logging.getLogger(__name__)
CPU_COLUMNS = 256  # of a product in float32: 40 to 60 GFLOP/s at 32 to 256 tokens and H = 1,024, 20 to 45 in one piece
Rows = slice | Tensor  # indexes the first axis of any [T, ...] tensor


def whole(hidden_TH: Tensor, shard: VocabShard, sequence_parallel: bool) -> Tensor:
    """The hidden states of all T tokens: an all-gather if each rank has its T / R of them, otherwise what is given."""
    return shard.all_gather(hidden_TH).flatten(0, 1) if sequence_parallel else hidden_TH


class Head:
    """Logits of one output layer, a block of tokens at a time in one reused buffer.

    With a soft cap and gradients there are two buffers: the logits before the cap are what its derivative is made of.
    """

    def __init__(
        self, hidden_TH: Tensor, weight_WH: Tensor, block_tokens: int, softcap: float | None, *, gradients: bool
    ):
        self.hidden_TH, self.weight_WH, self.softcap = hidden_TH, weight_WH, softcap
        self.raw_BW = hidden_TH.new_empty((min(block_tokens, len(hidden_TH)), len(weight_WH)))
        self.logits_BW = self.raw_BW if softcap is None or not gradients else torch.empty_like(self.raw_BW)

    def logits(self, rows: Rows) -> Tensor:
        """Of some tokens; good until the next call."""
        hidden_BH = self.hidden_TH[rows]
        raw_BW, logits_BW = self.raw_BW[: len(hidden_BH)], self.logits_BW[: len(hidden_BH)]
        multiply(hidden_BH, self.weight_WH, raw_BW)
        if self.softcap is not None:
            softcap_passes(raw_BW).cap(raw_BW, self.softcap, logits_BW)
        return logits_BW

    def uncap(self, grad_BW: Tensor) -> None:
        """Overwrites the gradient of the last block's logits, or of their first columns, with that of the products."""
        if self.softcap is not None:
            raw_BW = self.raw_BW[: len(grad_BW), : grad_BW.shape[1]]
            softcap_passes(grad_BW).uncap(raw_BW, self.softcap, grad_BW)


class Gradients:
    """The gradients of hidden states and weight, to which blocks add; either is None where nobody wants it.

    The hidden gradient's sum over the ranks starts as soon as the last block is in it, beside that block's product for
    the weight.
    """

    def __init__(self, head: Head, shard: VocabShard, grad_WH: Tensor | None, *, of_hidden: bool, scatter: bool):
        self.head, self.shard, self.grad_WH, self.scatter = head, shard, grad_WH, scatter
        self.grad_TH = torch.zeros_like(head.hidden_TH) if of_hidden else None
        self.wait = None

    def add(self, rows: Rows, logits_grad_BW: Tensor, *, last: bool) -> None:
        """One block's part, from the gradient of its logits."""
        width = logits_grad_BW.shape[1]
        if self.grad_TH is not None:
            self.grad_TH[rows] = logits_grad_BW @ self.head.weight_WH[:width]
            if last:
                self.start()
        if self.grad_WH is not None:
            add_product(self.grad_WH[:width], logits_grad_BW, self.head.hidden_TH[rows])

    def start(self) -> None:
        """Nothing more is to be added to the hidden gradient."""
        self.wait = self.shard.start_sum_over_ranks(self.grad_TH, scatter=self.scatter)

    def finish(self) -> Tensor | None:
        """The gradient of the hidden states that this rank has been given."""
        if self.grad_TH is None:
            return None
        if self.wait is None:  # no block has been added
            self.start()
        return self.wait()


def multiply(hidden_BH: Tensor, weight_WH: Tensor, out_BW: Tensor) -> None:
    """out_BW = hidden_BH @ weight_WH.T; a library that sums up in float32 beside it takes no more than out_BW does.

    On CPUs without bfloat16 instructions oneDNN does so: twice the memory of a whole product in 16 bits. In float32 the
    library is up to twice as fast where a few hundred rows of the weight, which stay in its caches, are all it sees.
    """
    columns = len(weight_WH)
    if out_BW.device.type == "cpu":
        columns = CPU_COLUMNS if out_BW.dtype == torch.float32 else max(1, columns // 2)
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


def weight_gradient(weight_WH: Tensor, *, single: bool, into_main_grad: bool) -> Tensor:
    """[W, H] to which products are added: main_grad, or zeros in float32, unless a single product is all there is."""
    if into_main_grad:
        return weight_WH.main_grad
    return torch.zeros_like(weight_WH, dtype=weight_WH.dtype if single else torch.float32)


def keep_gradients(
    ctx, gradients: Gradients, weight_WH: Tensor, into_main_grad: bool, supervised_T: Tensor, token_weight_T: Tensor
) -> None:
    """Keeps for the backward what a forward has made of the sum of token_weight * loss; see `give_gradients`."""
    ctx.gradients, ctx.weight = (gradients.finish(), gradients.grad_WH), weight_WH
    ctx.into_main_grad = into_main_grad and gradients.grad_WH is not None
    ctx.save_for_backward(supervised_T, token_weight_T)
    ctx.set_materialize_grads(False)  # no zeros for the outputs without a gradient


def give_gradients(ctx, grad_T: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of hidden states and weight that were kept, times the one number that the backward brings.

    Raises:
        RuntimeError: see `common_factor`; and the second time, for they are given away.
    """
    if ctx.gradients is None:
        raise RuntimeError("gradient_in_forward gives its gradients away once; there is no second backward")
    supervised_T, token_weight_T = ctx.saved_tensors
    grad_T = torch.zeros_like(token_weight_T) if grad_T is None else grad_T
    factor = common_factor(grad_T, supervised_T, token_weight_T, is_one=ctx.into_main_grad)
    (grad_TH, grad_WH), ctx.gradients = ctx.gradients, None
    if ctx.into_main_grad:
        return grad_TH, hand_over(ctx.weight)
    if grad_TH is not None:
        grad_TH *= factor
    if grad_WH is not None:
        grad_WH = grad_WH.mul_(factor).to(ctx.weight.dtype)
    return grad_TH, grad_WH


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
