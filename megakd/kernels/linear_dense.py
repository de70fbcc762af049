"""linear_dense_kd_loss: the exact divergence of two models over the whole vocabulary, from their last hidden states.

Neither model's logits [T, W] exist: both output layers are applied to a block of tokens at a time, and what
`dense_kd_loss` reads of them is kept in 7 numbers a token. The teacher's part of a step is its hidden states, a few
kilobytes a token, and any divergence at any temperature is exact.

Sizes: T tokens, H and G hidden of student and teacher, W vocabulary columns on this rank, R ranks.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megakd.kernels.dense import build_options
from megakd.kernels.linear import check_all_supervised, check_gradients, check_head
from megakd.kernels.linear_dense_autograd import PairGradientInForward, PairLayout, RecomputePairs
from megakd.kernels.terms import KDLoss, check_labels
from megakd.kernels.vocab import VocabShard


def linear_dense_kd_loss(
    hidden_TH: Tensor,
    weight_WH: Tensor,
    teacher_hidden_TG: Tensor,
    teacher_weight_WG: Tensor,
    labels_T: Tensor,
    shard: VocabShard,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    student_temperature: float | None = None,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    gradient_in_forward: bool = False,
    token_weight_T: Tensor | None = None,
    sequence_parallel: bool = False,
    all_supervised: bool = False,
    accumulate_into_main_grad: bool = False,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    block_tokens: int | None = None,
    on_logits: Callable[[slice | Tensor, Tensor, Tensor], None] | None = None,
    **parameters: float,
) -> KDLoss:
    """`dense_kd_loss` of hidden_TH @ weight_WH.T and teacher_hidden_TG @ teacher_weight_WG.T, which never exist whole.

    The logits of a block are rounded to the dtype of the hidden states they are made of, like those of an output layer.

    Args:
        hidden_TH, weight_WH: the student's, as in `linear_kd_loss`.
        teacher_hidden_TG: the teacher's, the same on every rank, float32, bfloat16 or float16; no gradient.
        teacher_weight_WG: this rank's rows of its output layer, in the dtype of its hidden states; no gradient.
        labels_T, shard, divergence, temperature … ce_weight, parameters: as in `dense_kd_loss`.
        gradient_in_forward … accumulate_into_main_grad, block_tokens: as in `linear_kd_loss`. With
            `sequence_parallel` the teacher's hidden states too are this rank's T / R consecutive tokens.
        softcap, teacher_softcap: of the student's and the teacher's logits.
        on_logits: called in the forward with (rows, student's logits, teacher's logits) of each block.
    Returns:
        KDLoss of all T tokens; both masses are 1.
    Raises:
        ValueError: as `dense_kd_loss` and `linear_kd_loss`.
    Collectives: of the forward, those of `dense_kd_loss` (once per block with gradient_in_forward) and with
        `sequence_parallel` an all-gather of both hidden states; of the backward, those of `linear_kd_loss`, and with
        `sequence_parallel` the teacher's hidden states once more unless gradient_in_forward.
    Memory: beside gradients and hidden states, one block of logits [block_tokens, W] of each model (of the student two
        with a softcap) and at most as much as one for products; the weight's gradient is summed in float32.
    Products: 2 in the forward, 4 in the backward; with gradient_in_forward 4 in all. A divergence that mixes P and Q
        makes the logits of all blocks but one once more, unless gradient_in_forward.
    """
    block_tokens = check_head(hidden_TH, weight_WH, shard, softcap, block_tokens)
    check_head(teacher_hidden_TG, teacher_weight_WG, shard, teacher_softcap, block_tokens)
    given = divergence, parameters, temperature, student_temperature, kd_weight, ce_weight
    options, temperatures = build_options(*given)
    parts = shard.ranks if sequence_parallel else 1
    tokens = len(hidden_TH) * parts
    check_labels(labels_T, tokens, len(teacher_hidden_TG) * parts)
    if all_supervised:
        check_all_supervised(labels_T)
    check_gradients(weight_WH, tokens, gradient_in_forward, token_weight_T, accumulate_into_main_grad)
    how = sequence_parallel, all_supervised, accumulate_into_main_grad, block_tokens, (softcap, teacher_softcap)
    layout = PairLayout(shard, options, temperatures, *how, on_logits)
    inputs = hidden_TH, weight_WH, teacher_hidden_TG.detach(), teacher_weight_WG.detach(), labels_T
    with torch.autocast(hidden_TH.device.type, enabled=False):  # products are in the dtype that is given
        if not gradient_in_forward:
            return KDLoss(*RecomputePairs.apply(*inputs, layout))
        if token_weight_T is None:
            token_weight_T = torch.ones(tokens, device=hidden_TH.device)
        return KDLoss(*PairGradientInForward.apply(*inputs, token_weight_T, layout))
