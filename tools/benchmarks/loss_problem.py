"""What the losses are given, and the float64 answer.

Two kinds of problems: `logits` (both models' logits are at hand) and `head` (hidden states and output layers are).
Sizes: T tokens, K entries per token, W vocabulary columns on this rank, V the vocabulary, H hidden, R ranks.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.kernels import VocabShard, kd_loss_reference
from megakd.targets import TeacherTargets


@dataclass(frozen=True)
class Spec:
    """What a form computes per token: kd_weight * temperature**2 * D + ce_weight * CE.

    teacher: what D compares: `top_k` entries, `sampled` ones, the `whole` vocabulary; `none` for CE alone.
    """

    teacher: str = "top_k"
    divergence: str = "forward_kl"
    tail: str = "bucket"
    temperature: float = 1.0
    kd_weight: float = 1.0
    ce_weight: float = 0.0


@dataclass
class Problem:
    """One rank's part. `inputs` are what gradients are asked for; `restore` makes it ready for the next run.

    Of a `logits` problem student_TW and teacher_TW are set; of a `head` problem the four others.
    """

    shard: VocabShard
    labels_T: Tensor
    generator: torch.Generator
    student_TW: Tensor | None = None
    teacher_TW: Tensor | None = None
    hidden_TH: Tensor | None = None
    weight_WH: Tensor | None = None
    teacher_hidden_TH: Tensor | None = None
    teacher_weight_WH: Tensor | None = None

    def __post_init__(self):
        self.inputs = (self.hidden_TH, self.weight_WH) if self.student_TW is None else (self.student_TW,)
        for x in self.inputs:
            x.requires_grad_()
        if self.student_TW is None:
            self.weight_WH.main_grad = torch.zeros_like(self.weight_WH, dtype=torch.float32)
        else:
            self._pristine = self.student_TW.detach().clone()

    @property
    def tokens(self) -> int:
        return len(self.labels_T)

    def restore(self) -> None:
        """Puts the student's logits back to what they were, and the sum of the weight's gradients to 0."""
        if self.student_TW is None:
            self.weight_WH.main_grad.zero_()
        else:
            self.student_TW.data.copy_(self._pristine)

    def both_TV(self) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's logits over the whole vocabulary, float64, on every rank."""
        if self.student_TW is not None:
            return tuple(_whole(x_TW.detach(), self.shard).double() for x_TW in (self.student_TW, self.teacher_TW))
        pairs = (self.hidden_TH, self.weight_WH), (self.teacher_hidden_TH, self.teacher_weight_WH)
        return tuple(
            hidden_TH.detach().double() @ _whole(weight_WH.detach().T, self.shard).double()
            for hidden_TH, weight_WH in pairs
        )


def build_logits(
    tokens: int, vocab: int, shard: VocabShard, device: torch.device, dtype: torch.dtype, planted: int | None = None
) -> Problem:
    """A teacher and a student that resembles it.

    Args:
        planted: make exactly so many logits of a teacher's row stand out, so that there are no ties about which are the
            largest; without it the rows are Gaussian, and in bfloat16 full of ties.
    """
    common, own = _generators(shard, device)
    shape = tokens, shard.stop - shard.start
    teacher_TW = torch.randn(shape, generator=own, device=device)
    if planted is None:
        teacher_TW *= 2
    else:
        ids_TK = torch.rand((tokens, vocab), generator=common, device=device).topk(planted, 1).indices
        values_TK = 4 + 6 * torch.rand((tokens, planted), generator=common, device=device)
        columns_TK = shard.columns(ids_TK)
        room_TW = torch.cat([teacher_TW.clamp_(max=3.75), teacher_TW.new_empty((tokens, 1))], 1)
        room_TW.scatter_(1, columns_TK.where(columns_TK >= 0, shape[1]), values_TK)
        teacher_TW = room_TW[:, :-1]
    student_TW = torch.randn(shape, generator=own, device=device).add_(teacher_TW, alpha=0.7)
    labels_T = torch.randint(vocab, (tokens,), generator=common, device=device)
    return Problem(
        shard, labels_T, common, student_TW=student_TW.to(dtype), teacher_TW=teacher_TW.to(dtype).contiguous()
    )


def build_head(
    tokens: int,
    vocab: int,
    hidden: int,
    shard: VocabShard,
    device: torch.device,
    dtype: torch.dtype,
    exact: bool = False,
) -> Problem:
    """Hidden states and output layers of a teacher and a student, hidden states equal on all ranks.

    Args:
        exact: numbers of which every logit is a multiple of 1/2 of at most 16, so that no dtype rounds it.
    """
    common, own = _generators(shard, device)
    width = shard.stop - shard.start

    def pair():
        if exact:
            signs = [torch.randint(2, shape, generator=g, device=device) * 2.0 - 1 for shape, g in shapes]
            signs[0][:, 64:] = 0
            return [signs[0].to(dtype), (signs[1] / 4).to(dtype)]
        hidden_TH, weight_WH = (torch.randn(shape, generator=g, device=device) for shape, g in shapes)
        return [hidden_TH.to(dtype), (weight_WH * 2 / hidden**0.5).to(dtype)]

    shapes = ((tokens, hidden), common), ((width, hidden), own)
    student, teacher = pair(), pair()
    labels_T = torch.randint(vocab, (tokens,), generator=common, device=device)
    names = "hidden_TH weight_WH teacher_hidden_TH teacher_weight_WH".split()
    return Problem(shard, labels_T, common, **dict(zip(names, student + teacher, strict=True)))


def _generators(shard: VocabShard, device: torch.device) -> list[torch.Generator]:
    """One in the same state on every rank, one of this rank's own."""
    return [torch.Generator(device).manual_seed(seed) for seed in (1, 2 + shard.rank)]


def _whole(x_TW: Tensor, shard: VocabShard) -> Tensor:
    return torch.cat(list(shard.all_gather(x_TW)), 1)


@dataclass(frozen=True)
class Verdict:
    """How far a form is from float64.

    loss_error: largest error of a token's loss over the largest loss. gradient_error: norm of the error over the norm
    of the truth: the worst of the columns of entries and label and all others, or of hidden states and weights.
    gradient_factor: what the true gradient is to be multiplied by to come closest.
    """

    loss_error: float
    gradient_error: float
    gradient_factor: float

    def right(self, tolerance: float) -> bool:
        return self.loss_error <= tolerance and self.gradient_error <= tolerance


def top_k_targets(teacher_TV: Tensor, top_k: int, temperature: float) -> TeacherTargets:
    """The K largest logits, equal ones by ascending id, in float64 until the last step."""
    logprobs_TV = (teacher_TV / temperature).log_softmax(1)
    ids_TK = teacher_TV.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    log_tail_T = logprobs_TV.scatter(1, ids_TK, -torch.inf).logsumexp(1)
    return TeacherTargets(ids_TK, logprobs_TV.gather(1, ids_TK).float(), log_tail_T.float(), temperature)


def judge(
    problem: Problem,
    spec: Spec,
    top_k: int,
    targets: TeacherTargets | None,
    loss_T: Tensor,
    grads: tuple[Tensor, ...],
    gives: str = "tokens",
) -> Verdict:
    """Compares a loss and its gradients with the definition in float64, on every rank for its own part. Collective.

    Args:
        targets: those that were drawn, if they were (each rank's own); selected ones are selected here again.
        gives: what loss_T is: `tokens`, the loss of each; `parts`, which add up to it over the ranks; `mean`.
    """
    shard, vocab = problem.shard, problem.shard.size
    student_TV, teacher_TV = problem.both_TV()
    student_TV.requires_grad_()
    if spec.teacher == "sampled":
        parts = [torch.cat(list(shard.all_gather(x)), 1) for x in (targets.ids_TK, targets.logprobs_TK)]
        true_targets = TeacherTargets(*parts, targets.log_tail_T, targets.temperature, targets.entropy_T)
    else:
        entries = vocab if spec.teacher == "whole" else top_k
        true_targets = top_k_targets(teacher_TV, entries, spec.temperature)
    true_loss_T = kd_loss_reference(
        student_TV,
        true_targets,
        problem.labels_T,
        VocabShard(0, vocab, vocab),
        divergence=spec.divergence,
        tail=spec.tail,
        kd_weight=spec.kd_weight,
        ce_weight=spec.ce_weight,
    ).loss_T
    (true_TV,) = torch.autograd.grad(true_loss_T.sum(), student_TV)
    in_S_TV = torch.zeros_like(true_TV, dtype=torch.bool)
    if spec.teacher in ("top_k", "sampled"):
        padded_TV = torch.cat([in_S_TV, in_S_TV[:, :1]], 1)
        padded_TV.scatter_(1, true_targets.ids_TK.where(true_targets.ids_TK >= 0, vocab), True)
        in_S_TV = padded_TV[:, :-1]
    if spec.ce_weight:
        in_S_TV[torch.arange(problem.tokens), problem.labels_T] = True
    mine = slice(shard.start, shard.stop)
    if problem.student_TW is not None:
        inside_TW = in_S_TV[:, mine]
        pairs = [(grads[0][where], true_TV[:, mine][where]) for where in (inside_TW, ~inside_TW)]
        pairs += [(grads[0], true_TV[:, mine])]
    else:
        weight_HV = _whole(problem.weight_WH.detach().T, shard).double()
        truths = true_TV @ weight_HV.T, true_TV[:, mine].T @ problem.hidden_TH.detach().double()
        pairs = list(zip(grads, truths, strict=True))
    given, truth = pairs[-1]
    errors = [_relative(*pair, negligible=1e-9 * truth.norm()) for pair in pairs]
    factor = float((given.double() * truth).sum() / truth.square().sum().clamp(min=1e-300))
    given_T = loss_T.detach().double()
    if gives == "parts" and shard.ranks > 1:
        dist.all_reduce(given_T)
    if gives == "mean":
        true_loss_T = true_loss_T.mean().expand_as(given_T)
    loss_error = (given_T - true_loss_T).abs().max() / true_loss_T.abs().max()
    worst = torch.stack([loss_error, torch.stack(errors).max()])
    if shard.ranks > 1:
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return Verdict(*worst.tolist(), factor)


def _relative(given: Tensor, truth: Tensor, negligible: Tensor) -> Tensor:
    """Of a truth that is 0 but for rounding the error itself."""
    error, size = (given.double() - truth).norm(), truth.norm()
    return error / size if size > negligible else error
