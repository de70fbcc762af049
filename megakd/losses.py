"""The objective: per-token losses of the kernels, weighted by the config, as (sum, count) pairs.

loss = ce_weight * CE + kd_weight * temperature^2 * D(teacher, student), summed over supervised tokens. It is divided
once, at the very end, by the number of supervised tokens of the whole global batch, so the objective does not depend
on how the batch is cut into micro-batches and ranks.

Legend: T supervised tokens, W this rank's vocabulary columns.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from megakd.config import Loss
from megakd.divergences import PARAMETERS
from megakd.kernels import KDLoss, VocabShard, kd_loss, linear_dense_kd_loss, linear_kd_loss
from megakd.targets import TeacherTargets

SUMS = ("tokens", "loss", "kd", "ce", "teacher_mass", "student_mass", "teacher_ce", "agreement", "measured_tokens")
MEANS = {
    "loss": "tokens",
    "kd": "tokens",
    "ce": "tokens",
    "teacher_mass": "tokens",
    "student_mass": "tokens",
    "teacher_ce": "measured_tokens",
    "agreement": "measured_tokens",
}
BY_NAME = ("kd", "ce", "teacher_ce", "agreement", "tokens")  # of each of several teachers
OF_A_TEACHER = ("kd", "teacher_mass", "student_mass", "teacher_ce", "agreement")


def objective(
    logits_TW: Tensor,
    targets: TeacherTargets,
    labels_T: Tensor,
    shard: VocabShard,
    loss: Loss,
    *,
    inplace_backward: bool,
    keep: Callable[[KDLoss], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """The summed loss of some supervised tokens, and the sums to report.

    Args:
        logits_TW, targets, labels_T, shard: as for `kd_loss`; every label is a token.
        loss: the config's section; without a teacher kd_weight is 0 and the targets are empty.
        inplace_backward: let the gradient overwrite the logits.
        keep: is given the losses of every token.
    Returns:
        loss_sum: float32 scalar with gradient; not averaged.
        sums: float64 [len(SUMS)] without gradient; the last three are 0 here, `training.step` fills them in.
    """
    losses = kd_loss(logits_TW, targets, labels_T, shard, **options(loss), inplace_backward=inplace_backward)
    return summed(losses, labels_T, keep)


def fused_objective(
    hidden_TH: Tensor,
    weight_WH: Tensor,
    targets: TeacherTargets,
    labels_T: Tensor,
    shard: VocabShard,
    loss: Loss,
    *,
    softcap: float | None,
    block_tokens: int,
    on_logits: Callable[[slice | Tensor, Tensor], None] | None = None,
    keep: Callable[[KDLoss], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """`objective` of hidden_TH @ weight_WH.T, whose logits exist for `block_tokens` tokens at a time only.

    The gradients of loss_sum, and of no multiple of it, are formed at once: that of hidden_TH is summed over the ranks
    of the shard, that of the weight is added to its main_grad where Megatron's wrapper has given it one.

    Args:
        softcap, block_tokens, on_logits: as for `linear_kd_loss`; the rest as for `objective`.
    Raises:
        ValueError: a label is -100.
    """
    losses = linear_kd_loss(
        hidden_TH,
        weight_WH,
        targets,
        labels_T,
        shard,
        **options(loss),
        all_supervised=True,
        gradient_in_forward=True,
        accumulate_into_main_grad=getattr(weight_WH, "main_grad", None) is not None,
        softcap=softcap,
        block_tokens=block_tokens,
        on_logits=on_logits,
    )
    return summed(losses, labels_T, keep)


def whole_objective(
    hidden_TH: Tensor,
    weight_WH: Tensor,
    teacher_hidden_TG: Tensor,
    teacher_weight_WG: Tensor,
    labels_T: Tensor,
    shard: VocabShard,
    loss: Loss,
    *,
    softcaps: tuple[float | None, float | None],
    block_tokens: int,
    on_logits: Callable[[slice | Tensor, Tensor, Tensor], None] | None = None,
    keep: Callable[[KDLoss], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """`fused_objective` against a teacher's whole distribution, of which its final hidden states are given.

    Args:
        teacher_hidden_TG, teacher_weight_WG, on_logits: as for `linear_dense_kd_loss`.
        softcaps: of student and teacher; the rest as for `fused_objective`.
    Raises:
        ValueError: a label is -100; the teacher's logits are not finite.
    """
    losses = linear_dense_kd_loss(
        hidden_TH,
        weight_WH,
        teacher_hidden_TG,
        teacher_weight_WG,
        labels_T,
        shard,
        **whole_options(loss),
        all_supervised=True,
        gradient_in_forward=True,
        accumulate_into_main_grad=getattr(weight_WH, "main_grad", None) is not None,
        softcap=softcaps[0],
        teacher_softcap=softcaps[1],
        block_tokens=block_tokens,
        on_logits=on_logits,
    )
    return summed(losses, labels_T, keep)


def options(loss: Loss) -> dict:
    """The section as keyword arguments of the kernels."""
    names = ("divergence", "tail", "student_temperature", "kd_weight", "ce_weight", *PARAMETERS)
    return {name: getattr(loss, name) for name in names}


def whole_options(loss: Loss) -> dict:
    """The same of those that compare whole distributions: no tail, and the temperature, which targets carry else."""
    given = options(loss) | {"temperature": loss.temperature}
    del given["tail"]
    return given


def summed(losses: KDLoss, labels_T: Tensor, keep: Callable[[KDLoss], None] | None) -> tuple[Tensor, Tensor]:
    """Per-token losses as (loss_sum, sums)."""
    if keep:
        keep(losses)
    sums = torch.zeros(len(SUMS), dtype=torch.float64, device=labels_T.device)
    sums[0] = len(labels_T)
    for i, part_T in enumerate((losses.loss_T, losses.kd_T, losses.ce_T, losses.teacher_mass_T, losses.student_mass_T)):
        sums[i + 1] = part_T.detach().double().sum()
    return losses.loss_T.sum(), sums


def means(sums: Tensor, with_teacher: bool) -> dict[str, float]:
    """Averages of a reduced vector of sums, and `tokens`; what was not measured is left out, never reported as 0.

    The teacher's CE is unknown (NaN) where an imported recording does not hold a label's probability.
    """
    by_name = dict(zip(SUMS, sums.tolist(), strict=True))
    averages = {
        name: by_name[name] / by_name[count]
        for name, count in MEANS.items()
        if by_name[count] > 0 and (with_teacher or name not in OF_A_TEACHER)
    }
    if math.isnan(averages.get("teacher_ce", 0.0)):
        del averages["teacher_ce"]
    return averages | {"tokens": by_name["tokens"]}


def means_by_name(sums: Tensor, names: list[str]) -> dict[str, float]:
    """`NAME/kd` and so on, over the tokens that each of several teachers teaches.

    Args:
        sums: reduced, [one more than names, len(SUMS)]; the first is that of all.
    """
    found = {}
    for name, own in zip(names, sums[1:], strict=True):
        averages = means(own, True)
        if averages["tokens"]:
            found |= {f"{name}/{key}": averages[key] for key in BY_NAME if key in averages}
    return found
