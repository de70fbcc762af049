"""What a teacher says about a micro-batch, and who can say it. Loss and loop cannot tell the sources apart.

Legend: T supervised tokens of a micro-batch, K entries of the teacher's distribution, W vocabulary columns of this
rank.
"""

import dataclasses
from typing import Protocol

import torch
from torch import Tensor

from megakd.config import Loss
from megakd.errors import TrainingError
from megakd.kernels import KDLoss, VocabShard, kd_loss
from megakd.losses import options
from megakd.models.micro_batch import MicroBatch
from megakd.targets import TeacherTargets


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What a teacher says about the supervised tokens of one micro-batch.

    Attributes:
        targets: its top-K distribution.
        label_logprob_T: log-probability of the label at temperature 1, nats.
        id_T: its own most likely id.
    """

    targets: TeacherTargets
    label_logprob_T: Tensor
    id_T: Tensor

    def rows(self, part_T: Tensor) -> "Lesson":
        """About some of the tokens."""
        return Lesson(self.targets.rows(part_T), self.label_logprob_T[part_T], self.id_T[part_T])

    def losses(self, logits_TW: Tensor, labels_T: Tensor, shard: VocabShard, loss: Loss) -> KDLoss:
        """Of the student's logits, as the loss section says; without gradient."""
        return kd_loss(logits_TW.detach(), self.targets, labels_T, shard, **options(loss))


class TeacherSource(Protocol):
    """Anything that gives lessons for the micro-batches of a step, in order, on the last pipeline stage.

    They are `Lesson`, `teachers.whole_lesson.WholeLesson`, or `teachers.mixed.MixedLesson` of these. `step` is the
    optimizer step that learns from them (the first is 1), 0 where none does.
    """

    def lessons(self, micro_batches: list[MicroBatch], step: int = 0) -> list: ...


def join(lessons: list[Lesson]) -> Lesson:
    """Lessons of consecutive tokens as one."""
    if len(lessons) == 1:
        return lessons[0]
    parts = [lesson.targets for lesson in lessons]
    names = ["ids_TK", "logprobs_TK", "log_tail_T"]
    if parts[0].entropy_T is not None:
        names.append("entropy_T")
    whole = {name: torch.cat([getattr(targets, name) for targets in parts]) for name in names}
    return Lesson(
        dataclasses.replace(parts[0], **whole),
        torch.cat([lesson.label_logprob_T for lesson in lessons]),
        torch.cat([lesson.id_T for lesson in lessons]),
    )


def no_lesson(tokens: int, device) -> Lesson:
    """The lesson of plain training: no entries, all mass in the tail; only ce_weight may be above 0 with it."""
    none = TeacherTargets(
        torch.empty(tokens, 0, dtype=torch.int64, device=device),
        torch.empty(tokens, 0, device=device),
        torch.zeros(tokens, device=device),
    )
    return Lesson(none, torch.zeros(tokens, device=device), torch.full((tokens,), -1, device=device))


def not_finite(error: ValueError) -> TrainingError:
    """What a run says of a teacher whose logits cannot be used."""
    return TrainingError(f"the online teacher: {error}", hint="look at the teacher's weights and at train.precision")
