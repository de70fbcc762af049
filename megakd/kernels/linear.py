"""linear_kd_loss and linear_select_top_k: the output layer and what follows it, a block of tokens at a time.

The logits [T, W] never exist. In the forward each block's logits give their statistics and are thrown away; the
records of all tokens go round at once. The backward makes each block's logits again, turns them into their gradient in
place, and multiplies it by the weight and by the hidden states. With `gradient_in_forward` both happen in the forward,
for a loss whose per-token weights are known but for one common factor: no second product, but a collective for each
block.

Sizes: T tokens, H hidden, W vocabulary columns on this rank, K entries per token, R ranks.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megakd.kernels.checks import expect
from megakd.kernels.head import whole
from megakd.kernels.linear_autograd import GradientInForward, Layout, Recompute
from megakd.kernels.paths import softcap_passes
from megakd.kernels.selection import select_top_k
from megakd.kernels.softcap import check_softcap
from megakd.kernels.terms import KDLoss, build_options, check_labels
from megakd.kernels.vocab import MASKED, VocabShard
from megakd.targets import TeacherTargets

BLOCK_TOKENS = 1024
DEVICE_BLOCK_TOKENS = 4096  # on other devices: products that fill a GPU, and few launches


def linear_select_top_k(
    hidden_TH: Tensor,
    weight_WH: Tensor,
    top_k: int,
    shard: VocabShard,
    temperature: float = 1.0,
    *,
    gather: bool = False,
    sequence_parallel: bool = False,
    softcap: float | None = None,
    block_tokens: int | None = None,
) -> TeacherTargets:
    """`select_top_k` of hidden_TH @ weight_WH.T, which exists for `block_tokens` tokens at a time.

    Args:
        hidden_TH, weight_WH, sequence_parallel, softcap, block_tokens: as in `linear_kd_loss`, without gradients.
        top_k, shard, temperature, gather: as in `select_top_k`.
    Raises:
        ValueError: as `select_top_k`; shapes or dtypes of hidden states and weight that do not fit.
    Collectives: those of `select_top_k`, once per block; an all-gather of the hidden states if `sequence_parallel`.
    """
    with torch.no_grad(), torch.autocast(hidden_TH.device.type, enabled=False):
        block_tokens = check_head(hidden_TH, weight_WH, shard, softcap, block_tokens)
        parts = []
        for block_BH in whole(hidden_TH, shard, sequence_parallel).split(block_tokens):
            logits_BW = block_BH @ weight_WH.T
            if softcap is not None:
                softcap_passes(logits_BW).cap(logits_BW, softcap, logits_BW)
            parts.append(select_top_k(logits_BW, top_k, shard, temperature, gather=gather))
    if len(parts) == 1:
        return parts[0]
    joined = (torch.cat([getattr(p, name) for p in parts]) for name in ("ids_TK", "logprobs_TK", "log_tail_T"))
    return TeacherTargets(*joined, temperature)


def linear_kd_loss(
    hidden_TH: Tensor,
    weight_WH: Tensor,
    targets: TeacherTargets,
    labels_T: Tensor,
    shard: VocabShard,
    *,
    divergence: str = "forward_kl",
    tail: str = "bucket",
    student_temperature: float | None = None,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    gradient_in_forward: bool = False,
    token_weight_T: Tensor | None = None,
    sequence_parallel: bool = False,
    all_supervised: bool = False,
    accumulate_into_main_grad: bool = False,
    softcap: float | None = None,
    block_tokens: int | None = None,
    on_logits: Callable[[slice | Tensor, Tensor], None] | None = None,
    **parameters: float,
) -> KDLoss:
    """`kd_loss` of hidden_TH @ weight_WH.T, whose memory does not grow with T times W.

    The logits of a block are rounded to the dtype of the hidden states, like those of an output layer.

    Args:
        hidden_TH: the same on every rank, float32, bfloat16 or float16; its gradient is summed over the ranks. Masked
            rows do not reach the product.
        weight_WH: this rank's rows of the output layer, in the dtype of the hidden states.
        targets, labels_T, shard, divergence … ce_weight, parameters: as in `kd_loss`.
        gradient_in_forward: form the gradients in the forward; the backward multiplies them by one number. Refused
            where gradients are off, as in the forward that activation recomputation repeats.
        token_weight_T: float32, with gradient_in_forward only: the objective is a multiple of the sum of
            token_weight_T * loss_T; None stands for ones. The backward refuses a gradient that is not a multiple of it.
            In float16 a loss scale belongs in here: gradients are rounded before the backward multiplies them.
        sequence_parallel: hidden_TH is this rank's T / R consecutive tokens, and so is its gradient; labels and targets
            are those of all T.
        all_supervised: no label is -100, which a device need not be asked then: nothing waits for it.
        accumulate_into_main_grad: add the weight's gradient to weight_WH.main_grad (float32), as Megatron's own layers
            do under gradient_accumulation_fusion, instead of returning it. With gradient_in_forward that happens in
            the forward, where no factor is known: the objective must be the sum of token_weight_T * loss_T itself.
        softcap: the logits are softcap * tanh(product / softcap); None: they are the product.
        block_tokens: tokens whose logits exist at one time; None: 1,024 on a CPU, 4,096 elsewhere.
        on_logits: called in the forward, on every rank, with (rows, logits) of each block of supervised tokens; `rows`
            indexes the T tokens, and the logits are overwritten when it has returned.
    Returns:
        KDLoss of all T tokens.
    Raises:
        ValueError: as `kd_loss`; shapes or dtypes of hidden states and weight that do not fit; options that exclude
            one another; a label of -100 in spite of `all_supervised`.
    Collectives: those of `kd_loss` (once per block with gradient_in_forward); the gradient of the hidden states is
        all-reduced; with `sequence_parallel` they are all-gathered (again in the backward) and it is reduce-scattered,
        beside the last block's product for the weight.
    Memory: beside gradients and hidden states, one block of logits [block_tokens, W] (two with a softcap) and at most
        as much as one for products; the weight's gradient is summed in float32.
    """
    block_tokens = check_head(hidden_TH, weight_WH, shard, softcap, block_tokens)
    options = build_options(targets, divergence, tail, parameters, student_temperature, kd_weight, ce_weight)
    tokens = len(hidden_TH) * (shard.ranks if sequence_parallel else 1)
    check_labels(labels_T, tokens, targets.tokens)
    if all_supervised:
        check_all_supervised(labels_T)
    check_gradients(weight_WH, tokens, gradient_in_forward, token_weight_T, accumulate_into_main_grad)
    how = sequence_parallel, all_supervised, accumulate_into_main_grad, block_tokens, softcap, on_logits
    layout = Layout(shard, options, *how)
    if token_weight_T is None:
        token_weight_T = torch.ones(tokens, device=hidden_TH.device)
    with torch.autocast(hidden_TH.device.type, enabled=False):  # products are in the dtype that is given
        if not gradient_in_forward:
            return KDLoss(*Recompute.apply(hidden_TH, weight_WH, targets, labels_T, layout))
        return KDLoss(*GradientInForward.apply(hidden_TH, weight_WH, targets, labels_T, token_weight_T, layout))


def check_gradients(
    weight_WH: Tensor,
    tokens: int,
    gradient_in_forward: bool,
    token_weight_T: Tensor | None,
    accumulate_into_main_grad: bool,
) -> None:
    """Raises ValueError for options of `linear_kd_loss` that exclude one another."""
    if accumulate_into_main_grad and getattr(weight_WH, "main_grad", None) is None:
        raise ValueError("accumulate_into_main_grad needs a weight with a main_grad")
    if token_weight_T is not None and (not gradient_in_forward or token_weight_T.shape != (tokens,)):
        raise ValueError(f"token_weight_T must be [{tokens}], and goes with gradient_in_forward only")
    if gradient_in_forward and not torch.is_grad_enabled():
        raise ValueError(
            "gradient_in_forward cannot be used where gradients are off, nor under activation recomputation"
        )


def check_all_supervised(labels_T: Tensor) -> None:
    """See `checks.expect`. Raises ValueError for a label of -100."""

    def explain():
        row = int((labels_T == MASKED).nonzero()[0])
        raise ValueError(f"label {MASKED} in row {row}, though all_supervised says that there is none")

    expect(labels_T != MASKED, "a label is -100, though all_supervised says that there is none", explain)


def check_head(
    hidden_TH: Tensor, weight_WH: Tensor, shard: VocabShard, softcap: float | None, block_tokens: int | None
) -> int:
    """Tokens of a block; raises ValueError unless hidden states and weight fit together and to the shard."""
    width = shard.stop - shard.start
    if hidden_TH.dim() != 2 or weight_WH.shape != (width, hidden_TH.shape[-1]):
        raise ValueError(
            f"hidden states must be [T, H] and the weight [{width}, H] for ids [{shard.start}, {shard.stop}), not "
            f"{list(hidden_TH.shape)} and {list(weight_WH.shape)}"
        )
    if hidden_TH.dtype != weight_WH.dtype or hidden_TH.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"hidden states and weight must both be float32, bfloat16 or float16, not {hidden_TH.dtype} and "
            f"{weight_WH.dtype}"
        )
    check_softcap(softcap)
    if block_tokens is None:
        return BLOCK_TOKENS if hidden_TH.device.type == "cpu" else DEVICE_BLOCK_TOKENS
    if block_tokens < 1:
        raise ValueError(f"block_tokens must be at least 1, not {block_tokens}")
    return block_tokens
