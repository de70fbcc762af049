"""The loss around the passes over whole rows: what they are given, and what is made of what they give.

Sizes: T tokens, K entries per token.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from megakd.divergences import find
from megakd.kernels import divergences, paths
from megakd.kernels.checks import expect
from megakd.kernels.records import Merged, merge_records
from megakd.kernels.vocab import MASKED, VocabShard
from megakd.targets import TeacherTargets

MASS_TOLERANCE = 1e-3
ROWS_MESSAGE = "a label is outside the vocabulary, or the teacher's entries and tail do not sum to 1"


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
    parameter: float  # of the divergence
    temperature: float  # the student's
    kd_weight: float
    ce_weight: float
    sampled: bool


class Supervised(NamedTuple):
    """Targets and labels on this rank's columns, with masked rows emptied so that nothing of them is read."""

    supervised_T: Tensor
    columns_TK: Tensor  # -1 where the entry is not on this rank
    logprobs_TK: Tensor  # -inf where the entry is not on this rank
    label_columns_T: Tensor  # -1 where the label is not on this rank

    def rows(self, index) -> "Supervised":
        """The same for some tokens."""
        return Supervised(*(x[index] for x in self))


class Saved(NamedTuple):
    """What the backward needs per token, beside this rank's entries; float64."""

    outside_max_T: Tensor  # raw logit
    entry_max_T: Tensor  # raw logit
    p_shift_T: Tensor
    q_shift_T: Tensor
    u_total_T: Tensor
    outside_T: Tensor  # dD/dz_j = outside * exp((x_j - outside_max) / temperature) for the columns outside S
    outside_at_one_T: Tensor  # softmax_j at temperature 1 = outside_at_one * exp(x_j - outside_max), outside S
    shift_at_one_T: Tensor  # softmax_j at temperature 1 = exp(x_j - entry_max + shift_at_one), in S

    def rows(self, index) -> "Saved":
        """The same for some tokens."""
        return Saved(*(x[index] for x in self))


class Factors(NamedTuple):
    """What `rows.backward` takes per token and entry, in its order; float32."""

    max_T: Tensor
    outside_T: Tensor
    outside_at_one_T: Tensor | None
    entry_grad_TK: Tensor
    label_grad_T: Tensor


def build_options(
    targets: TeacherTargets,
    divergence: str,
    tail: str,
    parameters: Mapping[str, float],
    student_temperature: float | None,
    kd_weight: float,
    ce_weight: float,
) -> Options:
    """Raises ValueError for a divergence, tail, parameter, temperature or kind of targets that do not go together."""
    parameter = find(divergence, tail).check_parameter(parameters)
    targets.check_shapes()
    sampled = targets.entropy_T is not None
    if sampled and (divergence != "forward_kl" or tail == "renormalize"):
        raise ValueError(
            f"sampled targets (with entropy_T) stand for the whole vocabulary and give forward_kl only, with any tail "
            f"but renormalize; not {divergence} with {tail}"
        )
    temperature = targets.temperature if student_temperature is None else student_temperature
    if not 0 < temperature < float("inf"):
        raise ValueError(f"student_temperature must be a positive number, not {temperature}")
    return Options(divergence, tail, parameter, float(temperature), float(kd_weight), float(ce_weight), sampled)


def check_labels(labels_T: Tensor, tokens: int, targets_tokens: int) -> None:
    """Raises ValueError unless labels are int64 and as many as tokens and targets; reads no tensor's content."""
    if labels_T.shape != (tokens,) or targets_tokens != tokens:
        raise ValueError(
            f"logits of {tokens} rows, targets of {targets_tokens} and labels {list(labels_T.shape)} must agree in the "
            f"number of tokens"
        )
    if labels_T.dtype != torch.int64:
        raise ValueError(f"labels must be int64, not {labels_T.dtype}")


def check_inplace(logits_TW: Tensor, inplace_backward: bool) -> None:
    """Raises ValueError where a gradient of its own for every logit has no place in the logits' memory."""
    shared = any(size > 1 and stride == 0 for size, stride in zip(logits_TW.shape, logits_TW.stride(), strict=True))
    if inplace_backward and shared:
        raise ValueError(f"inplace_backward needs logits that share no memory, not an expanded {list(logits_TW.shape)}")


def localize(targets: TeacherTargets, labels_T: Tensor, shard: VocabShard) -> Supervised:
    """Maps the entries and labels to this rank's columns."""
    if fused := paths.fused(labels_T, "megakd.kernels.triton.terms"):
        return Supervised(*fused.localize(targets.ids_TK, targets.logprobs_TK, labels_T, shard.start, shard.real_width))
    supervised_T = labels_T != MASKED
    columns_TK = shard.columns(targets.ids_TK)
    used_TK = supervised_T[:, None] & (columns_TK >= 0) & (targets.logprobs_TK != -torch.inf)
    return Supervised(
        supervised_T,
        columns_TK.where(used_TK, -1),
        targets.logprobs_TK.where(used_TK, -torch.inf),
        shard.columns(labels_T),
    )


def evaluate(
    record_TL: Tensor,
    entry_logits_TK: Tensor,
    s: Supervised,
    targets: TeacherTargets,
    labels_T: Tensor,
    shard: VocabShard,
    options: Options,
    numbers_T: Tensor | None = None,
) -> tuple[KDLoss, Saved]:
    """The outputs of the loss, from this rank's record. `numbers_T` are the rows' numbers for messages.

    Raises:
        ValueError: see `check_rows`.
    Collectives: all-gather of the record, and of 2 floats per token for divergences that mix P and Q.
    """
    records_RTL = shard.all_gather(record_TL)
    checked = targets.log_tail_T, s.supervised_T, labels_T, shard, numbers_T
    if fused := paths.fused(labels_T, "megakd.kernels.triton.terms"):
        kind, sums_RT2 = (options.divergence, options.tail, options.parameter), None
        if divergences.mixes(options.divergence):
            given = records_RTL, entry_logits_TK, s.logprobs_TK, *kind, options.temperature
            sums_RT2 = shard.all_gather(fused.entry_sums(*given))
        outputs, saved_8T, fine_T = fused.evaluate(
            records_RTL, sums_RT2, s.supervised_T, targets.log_tail_T, targets.entropy_T, labels_T, shard.size, *kind,
            (options.kd_weight, options.ce_weight), options.temperature, MASS_TOLERANCE,
        )  # fmt: skip
        merge = functools.partial(merge_records, records_RTL, options.temperature)
        expect(fine_T, ROWS_MESSAGE, lambda: check_rows(merge(), *checked))
        return KDLoss(*outputs), Saved(*saved_8T)
    merged = merge_records(records_RTL, options.temperature)
    check_rows(merged, *checked)
    log_tail_T = targets.log_tail_T.where(s.supervised_T, 0)
    compared, sums_T2 = divergences.compare(merged, log_tail_T, options.tail), None
    if divergences.mixes(options.divergence):
        above_TK = (entry_logits_TK - merged.entry_max_T[:, None].float()) / options.temperature
        logs = divergences.entry_logs(compared, s.logprobs_TK, above_TK)
        mine_T2 = divergences.entry_sums(options.divergence, *logs, options.parameter)
        sums_T2 = shard.all_gather(mine_T2).double().sum(0)
    value = divergences.evaluate(options.divergence, compared, merged, sums_T2, options.parameter)
    kd_T = value.kd_T if targets.entropy_T is None else value.kd_T - targets.entropy_T
    saved = Saved(
        merged.outside_max_T,
        merged.entry_max_T,
        compared.p_shift_T,
        compared.q_shift_T,
        value.u_total_T,
        (value.outside_T / merged.outside_sum_T).where(merged.outside_sum_T > 0, 0),
        (merged.outside_max_T - merged.lse_at_one_T).exp().where(merged.outside_sum_T > 0, 0),
        merged.entry_max_T - merged.lse_at_one_T,
    )
    parts = kd_T, merged.ce_T, merged.teacher_mass_T, merged.log_student_mass_T.exp()
    return total(*parts, s.supervised_T, options), saved


def check_rows(
    merged: Merged,
    log_tail_T: Tensor,
    supervised_T: Tensor,
    labels_T: Tensor,
    shard: VocabShard,
    numbers_T: Tensor | None,
) -> None:
    """On every rank alike; see `checks.expect`.

    Raises:
        ValueError: a label outside the vocabulary, or targets that miss some mass.
    """
    total_T = merged.teacher_mass_T + log_tail_T.double().exp()
    torn_T = supervised_T & ~((total_T - 1).abs() <= MASS_TOLERANCE)
    stray_T = find_stray(labels_T, supervised_T, shard)

    def explain():
        explain_stray(stray_T, labels_T, shard, numbers_T)
        row = int(torn_T.nonzero()[0])
        raise ValueError(
            f"the teacher's entries and tail sum to {total_T[row].item():.6g} in row {row_number(row, numbers_T)}; "
            f"expected 1 ({int(torn_T.sum())} rows of {len(torn_T)} are off by more than {MASS_TOLERANCE})\n"
            f"hint: targets that hold only a rank's own entries fit one split of the vocabulary; select them with "
            f"gather=True where student and teacher differ"
        )

    expect(~(torn_T | stray_T), ROWS_MESSAGE, explain)


def find_stray(labels_T: Tensor, supervised_T: Tensor, shard: VocabShard) -> Tensor:
    """Which labels are neither masked nor in the vocabulary."""
    return supervised_T & ((labels_T < 0) | (labels_T >= shard.size))


def explain_stray(stray_T: Tensor, labels_T: Tensor, shard: VocabShard, numbers_T: Tensor | None = None) -> None:
    """Raises ValueError naming the first of the stray labels, if there is one."""
    if stray_T.any():
        row = int(stray_T.nonzero()[0])
        raise ValueError(
            f"label {int(labels_T[row])} in row {row_number(row, numbers_T)} is neither {MASKED} nor an id of the "
            f"vocabulary [0, {shard.size})"
        )


def row_number(row: int, numbers_T: Tensor | None) -> int:
    """What a message calls a row."""
    return row if numbers_T is None else int(numbers_T[row])


def total(
    kd_T: Tensor, ce_T: Tensor, teacher_mass_T: Tensor, student_mass_T: Tensor, supervised_T: Tensor, options: Options
) -> KDLoss:
    """The outputs of the loss from its parts. A part whose weight is 0 has no say, even where it is infinite."""
    loss_T = torch.zeros_like(kd_T)
    if options.kd_weight:
        loss_T = loss_T + options.kd_weight * options.temperature**2 * kd_T
    if options.ce_weight:
        loss_T = loss_T + options.ce_weight * ce_T
    parts = loss_T, kd_T, ce_T, teacher_mass_T, student_mass_T
    return KDLoss(*(part.where(supervised_T, 0).float() for part in parts))


def gradient_factors(grad_T: Tensor, entry_logits_TK: Tensor, s: Supervised, saved: Saved, options: Options) -> Factors:
    """The gradient of the loss with respect to the raw logits, as the few numbers that determine it.

    With x = temperature * z, d(weight * temperature**2 * D)/dx = weight * temperature * dD/dz.
    """
    if fused := paths.fused(grad_T, "megakd.kernels.triton.terms"):
        weights = options.kd_weight, options.ce_weight
        given = entry_logits_TK, s.logprobs_TK, s.columns_TK, s.label_columns_T, saved
        return Factors(
            *fused.gradient_factors(grad_T, *given, options.divergence, options.parameter, weights, options.temperature)
        )
    gap_TK = entry_logits_TK - saved.entry_max_T[:, None].float()
    entry_grad_TK, outside_T = torch.zeros_like(gap_TK), torch.zeros_like(saved.outside_T)
    ce_T, outside_at_one_T = options.ce_weight * grad_T.double(), None
    if options.kd_weight:
        kd_T = options.kd_weight * options.temperature * grad_T.double()
        log_p_TK, log_q_TK = divergences.entry_logs(saved, s.logprobs_TK, gap_TK / options.temperature)
        _, u_TK = divergences.f_and_u(options.divergence, log_p_TK, log_q_TK, options.parameter)
        entry_grad_TK = kd_T[:, None].float() * (u_TK - saved.u_total_T[:, None].float() * log_q_TK.exp())
        outside_T = kd_T * saved.outside_T
    if options.ce_weight:
        outside_at_one_T = ce_T * saved.outside_at_one_T
        softmax_TK = (gap_TK + saved.shift_at_one_T[:, None].float()).exp()
        is_label_TK = (s.columns_TK == s.label_columns_T[:, None]) & (s.columns_TK >= 0)
        entry_grad_TK = entry_grad_TK + ce_T[:, None].float() * (softmax_TK - is_label_TK.float())
        if options.temperature == 1:
            outside_T, outside_at_one_T = outside_T + outside_at_one_T, None
        else:
            outside_at_one_T = outside_at_one_T.float()
    return Factors(saved.outside_max_T.float(), outside_T.float(), outside_at_one_T, entry_grad_TK, -ce_T.float())
