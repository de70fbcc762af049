"""kd_loss: top-K distillation over a sharded vocabulary, one read of the logits forward and one backward.

1. `rows.statistics` reads this rank's logits once: log-sum-exp outside the entries, the logits at entries and label.
2. `records.build_record` makes of them and the teacher's entries at most 10 floats per token, which are all-gathered
   and merged in rank order, so that every rank has the same bits.
3. `divergences` turns them into D and, in the backward, into a gradient for each entry and one factor for all others.
4. `rows.backward` reads the logits once more and writes the gradient. Nothing is sent.

Sizes: T tokens, K entries per token, W vocabulary columns on this rank, V the real vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megakd.kernels import divergences
from megakd.kernels.paths import row_passes
from megakd.kernels.records import Merged, build_record, merge_records
from megakd.kernels.vocab import MASKED, VocabShard
from megakd.targets import TeacherTargets

MASS_TOLERANCE = 1e-3


class KDLoss(NamedTuple):
    """Per token, float32, identical on every rank; 0 in masked rows. Only loss_T carries a gradient.

    loss_T = ce_weight * ce_T + kd_weight * student temperature**2 * kd_T; not averaged.
    kd_T: the divergence D in nats. ce_T: cross-entropy with the label at temperature 1, in nats.
    teacher_mass_T, student_mass_T: each model's probability (at its temperature) of the entries.
    """

    loss_T: Tensor
    kd_T: Tensor
    ce_T: Tensor
    teacher_mass_T: Tensor
    student_mass_T: Tensor


class Options(NamedTuple):
    """The plain numbers of one call of the loss."""

    divergence: str
    tail: str
    beta: float
    skew: float
    temperature: float
    kd_weight: float
    ce_weight: float


def kd_loss(
    logits_TW: Tensor,
    targets: TeacherTargets,
    labels_T: Tensor,
    shard: VocabShard,
    *,
    divergence: str = "forward_kl",
    tail: str = "bucket",
    beta: float = 0.5,
    skew: float = 0.1,
    student_temperature: float | None = None,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    inplace_backward: bool = False,
) -> KDLoss:
    """Distillation and cross-entropy losses per token of a student whose vocabulary is split over ranks.

    Args:
        logits_TW: the student's, float32, bfloat16 or float16, not divided by a temperature. All arithmetic is float32.
        targets: all entries of a row, or those of this rank's shard; the rest may be absent, here or elsewhere.
        labels_T: global ids, int64, the same on every rank; -100 masks the row: nothing of it is read, neither logits
            nor targets, its losses are 0 and its gradient is exactly 0.
        shard: this rank's part of the vocabulary.
        divergence: forward_kl = KL(teacher || student) or reverse_kl = KL(student || teacher).
        tail: what becomes of the mass outside the entries. `bucket`: one outcome more on both sides; `renormalize`:
            both models rescaled to the entries; `renormalize_teacher`: the teacher alone, against the student's whole
            vocabulary; `drop`: no term for it. The latter two only with forward_kl.
        beta, skew: parameters of divergences that have them.
        student_temperature: the student's logits are divided by it; None takes the teacher's.
        kd_weight, ce_weight: plain factors. temperature**2 (the student's) is applied here, once.
        inplace_backward: the backward overwrites logits_TW with its gradient and allocates nothing of that size; nobody
            else may need the logits then, and a second backward raises. Otherwise it makes one [T, W] gradient.
    Returns:
        KDLoss; no mean and no sum is taken.
    Raises:
        ValueError: shapes, dtypes or names that do not fit; a label outside [0, V); a supervised row whose teacher mass
            and tail do not sum to 1 within 1e-3, which is what targets of another shard or vocabulary look like.
    Collectives: one all-gather of 8 floats (temperature 1) or 10 per token and rank; none in the backward.
    Source: Hinton et al. 2015, arXiv:1503.02531; the gradients are derived in docs/loss.md.
    """
    divergences.check_divergence(divergence, tail)
    temperature = targets.temperature if student_temperature is None else student_temperature
    check_arguments(logits_TW, targets, labels_T, shard, temperature)
    options = Options(divergence, tail, beta, skew, float(temperature), float(kd_weight), float(ce_weight))
    return KDLoss(*_KDLoss.apply(logits_TW, targets, labels_T, shard, options, inplace_backward))


def check_arguments(
    logits_TW: Tensor, targets: TeacherTargets, labels_T: Tensor, shard: VocabShard, temperature: float
) -> None:
    """Raises ValueError unless shapes, dtypes and temperature fit; reads no tensor's content."""
    shard.check_logits(logits_TW)
    targets.check_shapes()
    tokens = logits_TW.shape[0]
    if targets.tokens != tokens or labels_T.shape != (tokens,):
        raise ValueError(
            f"logits {list(logits_TW.shape)}, targets of {targets.tokens} tokens and labels {list(labels_T.shape)} "
            f"must agree in the number of tokens"
        )
    if labels_T.dtype != torch.int64:
        raise ValueError(f"labels must be int64, not {labels_T.dtype}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"student_temperature must be a positive number, not {temperature}")


class Supervised(NamedTuple):
    """Targets and labels on this rank's columns, with masked rows emptied so that nothing of them is read."""

    supervised_T: Tensor
    columns_TK: Tensor
    logprobs_TK: Tensor  # -inf where the entry is not on this rank
    log_tail_T: Tensor
    label_columns_T: Tensor


def localize(targets: TeacherTargets, labels_T: Tensor, shard: VocabShard) -> Supervised:
    """Maps the entries and labels to this rank's columns."""
    supervised_T = labels_T != MASKED
    columns_TK = shard.columns(targets.ids_TK)
    used_TK = supervised_T[:, None] & (columns_TK >= 0) & (targets.logprobs_TK != -torch.inf)
    return Supervised(
        supervised_T,
        columns_TK.where(used_TK, -1),
        targets.logprobs_TK.where(used_TK, -torch.inf),
        targets.log_tail_T.where(supervised_T, 0),
        shard.columns(labels_T),
    )


def check_rows(merged: Merged, s: Supervised, labels_T: Tensor, shard: VocabShard) -> None:
    """Raises ValueError, on every rank alike, for labels outside the vocabulary and targets that miss some mass."""
    stray_T = s.supervised_T & ((labels_T < 0) | (labels_T >= shard.size))
    total_T = merged.teacher_mass_T + s.log_tail_T.double().exp()
    torn_T = s.supervised_T & ~((total_T - 1).abs() <= MASS_TOLERANCE)
    stray, torn = torch.stack([stray_T.any(), torn_T.any()]).tolist()
    if stray:
        row = int(stray_T.nonzero()[0])
        raise ValueError(
            f"label {int(labels_T[row])} in row {row} is neither {MASKED} nor an id of the vocabulary [0, {shard.size})"
        )
    if torn:
        row = int(torn_T.nonzero()[0])
        raise ValueError(
            f"the teacher's entries and tail sum to {total_T[row].item():.6g} in row {row}; expected 1 "
            f"({int(torn_T.sum())} rows of {len(torn_T)} are off by more than {MASS_TOLERANCE})\n"
            f"hint: targets that hold only a rank's own entries fit one split of the vocabulary; select them with "
            f"gather=True where student and teacher differ"
        )


class _KDLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TW, targets, labels_T, shard, options, inplace_backward):
        s = localize(targets, labels_T, shard)
        temperature, sampled = options.temperature, targets.entropy_T is not None
        stats = row_passes(logits_TW).statistics(
            logits_TW, s.columns_TK, s.label_columns_T, s.supervised_T, shard.real_width, temperature
        )
        record = build_record(stats, s.logprobs_TK, temperature, sampled=sampled)
        merged = merge_records(shard.all_gather(record), temperature)
        check_rows(merged, s, labels_T, shard)
        compared = divergences.compare(merged, s.log_tail_T, options.tail)
        kd_T = divergences.value(options.divergence, compared, merged)
        ctx.save_for_backward(logits_TW, stats.entry_logits_TK, *s, *merged, *compared)
        ctx.shard, ctx.options, ctx.inplace_backward = shard, options, inplace_backward
        outputs = total(kd_T, merged, s.supervised_T, options)
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_T, *_):
        logits_TW, entry_logits_TK, *rest = ctx.saved_tensors
        s, rest = Supervised(*rest[: len(Supervised._fields)]), rest[len(Supervised._fields) :]
        merged, rest = Merged(*rest[: len(Merged._fields)]), rest[len(Merged._fields) :]
        compared = divergences.Compared(*rest)
        factors = gradient_factors(grad_T, entry_logits_TK, s, merged, compared, ctx.options)
        out_TW = logits_TW.detach() if ctx.inplace_backward else torch.empty_like(logits_TW)
        row_passes(logits_TW).backward(
            logits_TW,
            s.columns_TK,
            s.label_columns_T,
            s.supervised_T,
            ctx.shard.real_width,
            ctx.options.temperature,
            *factors,
            out_TW,
        )
        return out_TW, None, None, None, None, None


def total(kd_T: Tensor, merged: Merged, supervised_T: Tensor, options: Options) -> KDLoss:
    """The outputs of the loss from its parts. A part whose weight is 0 has no say, even where it is infinite."""
    loss_T = torch.zeros_like(kd_T)
    if options.kd_weight:
        loss_T = loss_T + options.kd_weight * options.temperature**2 * kd_T
    if options.ce_weight:
        loss_T = loss_T + options.ce_weight * merged.ce_T
    parts = loss_T, kd_T, merged.ce_T, merged.teacher_mass_T, merged.log_student_mass_T.exp()
    return KDLoss(*(part.where(supervised_T, 0).float() for part in parts))


class Factors(NamedTuple):
    """What `rows.backward` needs per token and entry; float32."""

    max_T: Tensor
    outside_T: Tensor
    outside_at_one_T: Tensor | None
    entry_grad_TK: Tensor
    label_grad_T: Tensor


def gradient_factors(
    grad_T: Tensor,
    entry_logits_TK: Tensor,
    s: Supervised,
    merged: Merged,
    compared: divergences.Compared,
    options: Options,
) -> Factors:
    """The gradient of the loss with respect to the raw logits, as the few numbers that determine it.

    With x = temperature * z, d(weight * temperature**2 * D)/dx = weight * temperature * dD/dz.
    """
    gap_TK = entry_logits_TK - merged.entry_max_T[:, None].float()
    entry_grad_TK, outside_T = torch.zeros_like(gap_TK), torch.zeros_like(merged.ce_T)
    ce_T, outside_at_one_T = options.ce_weight * grad_T.double(), None
    if options.kd_weight:
        kd_T = options.kd_weight * options.temperature * grad_T.double()
        above_TK = gap_TK / options.temperature
        kd = divergences.gradient(options.divergence, compared, merged, s.logprobs_TK, above_TK)
        entry_grad_TK, outside_T = kd_T[:, None].float() * kd.entries_TK, kd_T * kd.outside_T
        outside_T = (outside_T / merged.outside_sum_T).where(merged.outside_sum_T > 0, 0)
    if options.ce_weight:
        outside_at_one_T = ce_T * (merged.outside_max_T - merged.lse_at_one_T).exp()
        outside_at_one_T = outside_at_one_T.where(merged.outside_sum_T > 0, 0)
        softmax_TK = (gap_TK + (merged.entry_max_T - merged.lse_at_one_T)[:, None].float()).exp()
        is_label_TK = (s.columns_TK == s.label_columns_T[:, None]) & (s.columns_TK >= 0)
        entry_grad_TK = entry_grad_TK + ce_T[:, None].float() * (softmax_TK - is_label_TK.float())
        if options.temperature == 1:
            outside_T, outside_at_one_T = outside_T + outside_at_one_T, None
        else:
            outside_at_one_T = outside_at_one_T.float()
    return Factors(merged.outside_max_T.float(), outside_T.float(), outside_at_one_T, entry_grad_TK, -ce_T.float())
