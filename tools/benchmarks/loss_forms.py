"""megakd's forms of the loss, as the benchmark runs them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from loss_problem import Problem, Spec
from torch import Tensor

from megakd.divergences import DIVERGENCES
from megakd.kernels import dense_kd_loss, kd_loss, linear_dense_kd_loss, sample_targets, select_top_k
from megakd.kernels.linear import BLOCK_TOKENS, linear_kd_loss, linear_select_top_k
from megakd.targets import TeacherTargets


@dataclass(frozen=True)
class Form:
    """One way to a loss.

    Args:
        family: whose it is.
        kind: of the problems it takes, `logits` or `head`.
        select: the teacher's part, timed for itself; None where the form has no such part.
        loss: the student's part: loss_T, float32 or wider, with a graph. Gets what `select` returned.
        gives: `tokens`, the loss of each; `parts`, which add up to it over the ranks; `mean`, that of all for each.
    """

    name: str
    family: str
    kind: str
    spec: Spec
    loss: Callable[[Problem, int, object], Tensor]
    select: Callable[[Problem, int], object] | None = None
    gives: str = "tokens"


def top_k_form(name: str, *, in_place: bool = True, **spec) -> Form:
    """kd_loss after select_top_k (or sample_targets)."""
    made = Spec(**spec)

    def select(problem: Problem, top_k: int) -> TeacherTargets:
        if made.teacher == "sampled":
            return sample_targets(problem.teacher_TW, top_k, problem.shard, problem.generator, made.temperature)
        return select_top_k(problem.teacher_TW, top_k, problem.shard, made.temperature)

    def loss(problem: Problem, top_k: int, targets: TeacherTargets) -> Tensor:
        return kd_loss(
            problem.student_TW,
            targets,
            problem.labels_T,
            problem.shard,
            divergence=made.divergence,
            tail=made.tail,
            kd_weight=made.kd_weight,
            ce_weight=made.ce_weight,
            inplace_backward=in_place,
        ).loss_T

    return Form(name, "megakd", "logits", made, loss, select)


def dense_form(name: str, **spec) -> Form:
    """dense_kd_loss, in place."""
    made = Spec(teacher="whole", **spec)

    def loss(problem: Problem, top_k: int, _) -> Tensor:
        return dense_kd_loss(
            problem.student_TW,
            problem.teacher_TW,
            problem.labels_T,
            problem.shard,
            divergence=made.divergence,
            ce_weight=made.ce_weight,
            inplace_backward=True,
        ).loss_T

    return Form(name, "megakd", "logits", made, loss)


class _Replicated(torch.autograd.Function):
    """Hidden states that all ranks share: their gradient is the sum over the ranks."""

    @staticmethod
    def forward(ctx, hidden_TH, shard):
        ctx.shard = shard
        return hidden_TH

    @staticmethod
    def backward(ctx, grad_TH):
        if ctx.shard.group is not None:
            dist.all_reduce(grad_TH, group=ctx.shard.group)
        return grad_TH, None


def materialised_form(name: str) -> Form:
    """Output layers as matrix products, then select_top_k and kd_loss on the logits."""

    def select(problem: Problem, top_k: int) -> TeacherTargets:
        return select_top_k(problem.teacher_hidden_TH @ problem.teacher_weight_WH.T, top_k, problem.shard)

    def loss(problem: Problem, top_k: int, targets: TeacherTargets) -> Tensor:
        logits_TW = _Replicated.apply(problem.hidden_TH, problem.shard) @ problem.weight_WH.T
        arguments = targets, problem.labels_T, problem.shard
        return kd_loss(logits_TW, *arguments, ce_weight=1.0, inplace_backward=True).loss_T

    return Form(name, "megakd", "head", Spec(ce_weight=1.0), loss, select)


def linear_form(name: str, **arguments) -> Form:
    """linear_select_top_k and linear_kd_loss; the weight's gradient goes to main_grad, as in Megatron."""

    def block_tokens(problem: Problem) -> int:
        return max(1, min(BLOCK_TOKENS, problem.tokens // 8))

    def select(problem: Problem, top_k: int) -> TeacherTargets:
        models = problem.teacher_hidden_TH, problem.teacher_weight_WH
        return linear_select_top_k(*models, top_k, problem.shard, block_tokens=block_tokens(problem))

    def loss(problem: Problem, top_k: int, targets: TeacherTargets) -> Tensor:
        return linear_kd_loss(
            problem.hidden_TH,
            problem.weight_WH,
            targets,
            problem.labels_T,
            problem.shard,
            ce_weight=1.0,
            accumulate_into_main_grad=True,
            block_tokens=block_tokens(problem),
            **arguments,
        ).loss_T

    return Form(name, "megakd", "head", Spec(ce_weight=1.0), loss, select)


def materialised_dense_form(name: str) -> Form:
    """Both output layers as matrix products, then dense_kd_loss on the logits."""

    def loss(problem: Problem, top_k: int, _) -> Tensor:
        student_TW = _Replicated.apply(problem.hidden_TH, problem.shard) @ problem.weight_WH.T
        teacher_TW = problem.teacher_hidden_TH @ problem.teacher_weight_WH.T
        arguments = problem.labels_T, problem.shard
        return dense_kd_loss(student_TW, teacher_TW, *arguments, ce_weight=1.0, inplace_backward=True).loss_T

    return Form(name, "megakd", "head", Spec(teacher="whole", ce_weight=1.0), loss)


def linear_dense_form(name: str, **arguments) -> Form:
    """linear_dense_kd_loss; the weight's gradient goes to main_grad, as in Megatron."""

    def loss(problem: Problem, top_k: int, _) -> Tensor:
        return linear_dense_kd_loss(
            problem.hidden_TH,
            problem.weight_WH,
            problem.teacher_hidden_TH,
            problem.teacher_weight_WH,
            problem.labels_T,
            problem.shard,
            ce_weight=1.0,
            accumulate_into_main_grad=True,
            block_tokens=max(1, min(BLOCK_TOKENS, problem.tokens * 7 // 64)),  # two blocks: 7/32 of a shard
            **arguments,
        ).loss_T

    return Form(name, "megakd", "head", Spec(teacher="whole", ce_weight=1.0), loss)


HEADLINE = "kd_loss bucket + CE, in place"
HEADLINE_DENSE = "dense_kd_loss forward_kl, in place"
BASELINE = "output layer, then kd_loss bucket + CE, in place"
LINEAR = "linear_kd_loss bucket + CE"
LINEAR_FORWARD = "linear_kd_loss bucket + CE, gradient in forward"
BASELINE_DENSE = "output layers, then dense_kd_loss forward_kl + CE, in place"
LINEAR_DENSE = "linear_dense_kd_loss forward_kl + CE"
LINEAR_DENSE_FORWARD = "linear_dense_kd_loss forward_kl + CE, gradient in forward"
HEADLINES = {HEADLINE, HEADLINE_DENSE, LINEAR, LINEAR_FORWARD, LINEAR_DENSE, LINEAR_DENSE_FORWARD}
BASELINES = {  # of the forms with an output layer, what does the same with whole logits
    LINEAR: BASELINE,
    LINEAR_FORWARD: BASELINE,
    LINEAR_DENSE: BASELINE_DENSE,
    LINEAR_DENSE_FORWARD: BASELINE_DENSE,
}

FORMS = [
    top_k_form(HEADLINE, ce_weight=1.0),
    top_k_form("kd_loss bucket + CE", ce_weight=1.0, in_place=False),
    top_k_form("kd_loss bucket, in place"),
    top_k_form("kd_loss renormalize, in place", tail="renormalize"),
    *(top_k_form(f"kd_loss {name}, in place", divergence=name) for name in DIVERGENCES if name != "forward_kl"),
    top_k_form("kd_loss bucket + CE at temperature 2, in place", ce_weight=1.0, temperature=2.0),
    top_k_form("kd_loss of K draws, in place", teacher="sampled"),
    *(dense_form(f"dense_kd_loss {name}, in place", divergence=name) for name in DIVERGENCES),
    materialised_form(BASELINE),
    linear_form(LINEAR),
    linear_form(LINEAR_FORWARD, gradient_in_forward=True),
    materialised_dense_form(BASELINE_DENSE),
    linear_dense_form(LINEAR_DENSE),
    linear_dense_form(LINEAR_DENSE_FORWARD, gradient_in_forward=True),
]
