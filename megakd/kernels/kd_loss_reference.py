"""The definition of kd_loss in plain PyTorch: the whole vocabulary on every rank, and autograd.

Sizes: T tokens, K entries per token, W vocabulary columns on this rank, V the real vocabulary, O outcomes compared.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

from megakd.kernels.terms import KDLoss, build_options
from megakd.kernels.vocab import MASKED, VocabShard
from megakd.targets import TeacherTargets


class _WholeVocabulary(torch.autograd.Function):
    """[T, W] of each rank -> [T, V] on every rank; the gradient is this rank's columns of the (replicated) gradient."""

    @staticmethod
    def forward(ctx, mine_TW, shard):
        ctx.shard, ctx.width = shard, mine_TW.shape[1]
        whole_TV = mine_TW.new_zeros(len(mine_TW), shard.size)
        whole_TV[:, shard.start : shard.start + shard.real_width] = mine_TW[:, : shard.real_width]
        if shard.group is not None:
            dist.all_reduce(whole_TV, group=shard.group)
        return whole_TV

    @staticmethod
    def backward(ctx, grad_TV):
        grad_TW = grad_TV.new_zeros(len(grad_TV), ctx.width)
        real = ctx.shard.real_width
        grad_TW[:, :real] = grad_TV[:, ctx.shard.start : ctx.shard.start + real]
        return grad_TW, None


def kd_loss_reference(
    logits_TW: Tensor,
    targets: TeacherTargets,
    labels_T: Tensor,
    shard: VocabShard,
    *,
    divergence: str = "forward_kl",
    tail: str = "bucket",
    student_temperature: float | None = None,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    inplace_backward: bool = False,
    **parameters: float,
) -> KDLoss:
    """What `kd_loss` computes, by its definition; arguments and results are the same, and so is what it raises for a
    divergence or tail. The content of targets and labels is not checked, `inplace_backward` is ignored, and the whole
    [T, V] is held several times over. float64 logits are allowed and keep float64.

    Collectives: two all-reduces of [T, V]; none in the backward.
    """
    options = build_options(targets, divergence, tail, parameters, student_temperature, kd_weight, ce_weight)
    temperature = options.temperature
    on_T = labels_T != MASKED
    x_TW = logits_TW[on_T].to(torch.promote_types(logits_TW.dtype, torch.float32))
    x_TV = _WholeVocabulary.apply(x_TW, shard)
    log_P_TV = _entries(targets.rows(on_T), shard, x_TW)
    log_P_tail_T = targets.log_tail_T[on_T].to(x_TV.dtype)
    log_Q_TV = (x_TV / temperature).log_softmax(1)

    in_S_TV = log_P_TV > -torch.inf
    log_Q_S_TV = log_Q_TV.masked_fill(~in_S_TV, -torch.inf)
    log_Q_tail_T = _logsumexp(log_Q_TV.masked_fill(in_S_TV, -torch.inf))
    log_m_T, log_q_T = _logsumexp(log_P_TV), _logsumexp(log_Q_S_TV)
    if tail in ("renormalize", "renormalize_teacher"):
        log_P_TV = log_P_TV - torch.where(log_m_T > -torch.inf, log_m_T, 0)[:, None]
    if tail == "renormalize":
        log_Q_S_TV = log_Q_S_TV - torch.where(log_q_T > -torch.inf, log_q_T, 0)[:, None]
    if tail != "bucket":
        log_P_tail_T = torch.full_like(log_m_T, -torch.inf)
        log_Q_tail_T = log_P_tail_T if tail == "renormalize" else log_Q_tail_T.where(log_m_T > -torch.inf, -torch.inf)
    log_p_TO = torch.cat([log_P_TV, log_P_tail_T[:, None]], 1)
    log_q_TO = torch.cat([log_Q_S_TV, log_Q_tail_T[:, None]], 1)

    kd_T = _divergence(divergence, log_p_TO, log_q_TO, options.parameter)
    if targets.entropy_T is not None:
        kd_T = kd_T + _kl(log_P_TV, torch.zeros_like(log_P_TV)).neg() - targets.entropy_T[on_T]
    ce_T = cross_entropy(x_TV, labels_T[on_T], reduction="none")
    loss_T = ce_weight * ce_T + kd_weight * temperature**2 * kd_T
    outputs = loss_T, *(part.detach() for part in (kd_T, ce_T, log_m_T.exp(), log_q_T.exp()))
    return KDLoss(*(part.new_zeros(len(on_T)).masked_scatter(on_T, part) for part in outputs))


def _entries(targets: TeacherTargets, shard: VocabShard, like: Tensor) -> Tensor:
    """log P of the entries over the whole vocabulary, -inf elsewhere; every rank contributes those of its shard."""
    columns_TK, width = shard.columns(targets.ids_TK), like.shape[1]
    log_P_TW = like.new_full((len(like), width + 1), -torch.inf)
    log_P_TW.scatter_(1, columns_TK.where(columns_TK >= 0, width), targets.logprobs_TK.to(like.dtype))
    return _WholeVocabulary.apply(log_P_TW[:, :width], shard)


def _divergence(name: str, log_p_TO: Tensor, log_q_TO: Tensor, weight: float) -> Tensor:
    definitions = {
        "forward_kl": lambda: _kl(log_p_TO, log_q_TO),
        "reverse_kl": lambda: _kl(log_q_TO, log_p_TO),
        "jsd": lambda: _jsd(log_p_TO, log_q_TO, weight),
        "skew_forward_kl": lambda: _kl(log_p_TO, _mix(log_p_TO, log_q_TO, weight)),
        "skew_reverse_kl": lambda: _kl(log_q_TO, _mix(log_q_TO, log_p_TO, weight)),
        "alpha": lambda: _alpha(log_p_TO, log_q_TO, weight),
        "tvd": lambda: (log_p_TO.exp() - log_q_TO.exp()).abs().sum(1) / 2,
    }
    return definitions[name]()


def _jsd(log_p_TO: Tensor, log_q_TO: Tensor, beta: float) -> Tensor:
    log_m_TO = _mix(log_p_TO, log_q_TO, beta)
    return beta * _kl(log_p_TO, log_m_TO) + (1 - beta) * _kl(log_q_TO, log_m_TO)


def _alpha(log_p_TO: Tensor, log_q_TO: Tensor, alpha: float) -> Tensor:
    """(1 - sum p^alpha q^(1 - alpha)) / (alpha (1 - alpha)), whose gradient is 0, not NaN, where p or q is 0.

    1 is taken as the sum of alpha p + (1 - alpha) q, which is 0 where nothing is compared.
    """
    whole_T = (alpha * log_p_TO.exp() + (1 - alpha) * log_q_TO.exp()).sum(1)
    both_TO = (log_p_TO > -torch.inf) & (log_q_TO > -torch.inf)
    log_p_TO, log_q_TO = log_p_TO.where(both_TO, 0), log_q_TO.where(both_TO, 0)
    common_TO = (alpha * log_p_TO + (1 - alpha) * log_q_TO).exp().where(both_TO, 0)
    return (whole_T - common_TO.sum(1)) / (alpha * (1 - alpha))


def _mix(log_a_TO: Tensor, log_b_TO: Tensor, weight: float) -> Tensor:
    """log(weight a + (1 - weight) b), whose gradient is 0, not NaN, where both are 0."""
    some_TO = (log_a_TO > -torch.inf) | (log_b_TO > -torch.inf)
    log_a_TO, log_b_TO = log_a_TO.where(some_TO, 0), log_b_TO.where(some_TO, 0)
    mixed_TO = torch.logaddexp(log_a_TO + math.log(weight), log_b_TO + math.log1p(-weight))
    return mixed_TO.where(some_TO, -torch.inf)


def _kl(log_p_TO: Tensor, log_q_TO: Tensor) -> Tensor:
    """Sum of p (log p - log q) over the outcomes with p > 0; gradients flow to both."""
    on_TO = log_p_TO > -torch.inf
    log_p_TO, log_q_TO = log_p_TO.where(on_TO, 0), log_q_TO.where(on_TO, 0)
    return (log_p_TO.exp() * (log_p_TO - log_q_TO)).where(on_TO, 0).sum(1)


def _logsumexp(x_TO: Tensor) -> Tensor:
    """log-sum-exp per row whose gradient is 0, not NaN, where everything is -inf."""
    some_T = (x_TO > -torch.inf).any(1)
    return x_TO.where(some_T[:, None], 0).logsumexp(1).where(some_T, -torch.inf)
