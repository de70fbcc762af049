"""A micro-batch whose samples are taught by several teachers: each says its part, and the student learns them apart.

Legend: T supervised tokens of a micro-batch, P those of one teacher, W vocabulary columns of this rank.
"""

import dataclasses

import torch
from torch import Tensor

from megakd.config import Loss
from megakd.models.output_layer import OutputLayer
from megakd.teachers.lesson import Lesson, join
from megakd.teachers.whole_lesson import WholeLesson


@dataclasses.dataclass(frozen=True)
class Part:
    """What one teacher says.

    Attributes:
        rows_P: int64, which of the tokens, ascending.
        lesson: about them.
        teacher: its number, where teachers have names; what is counted of it is reported apart.
        weight: factor of the divergence from it.
    """

    rows_P: Tensor
    lesson: Lesson | WholeLesson
    teacher: int | None = None
    weight: float = 1.0

    @property
    def counted(self) -> tuple[int, ...]:
        """The rows of sums to which it adds: those of all, and of its teacher if that has a name."""
        return (0,) if self.teacher is None else (0, 1 + self.teacher)

    def loss(self, loss: Loss) -> Loss:
        """The loss section as it holds for these tokens."""
        return loss if self.weight == 1 else loss.model_copy(update={"kd_weight": loss.kd_weight * self.weight})


@dataclasses.dataclass(frozen=True)
class MixedLesson:
    """What several teachers say about the supervised tokens of one micro-batch, each token in one part.

    Attributes:
        parts: at least one.
    """

    parts: tuple[Part, ...]

    def rows(self, part_T: Tensor) -> "MixedLesson":
        """About some of the tokens."""
        parts = []
        for part in self.parts:
            place_T = torch.full((self.tokens,), -1, device=part_T.device)
            place_T[part.rows_P] = torch.arange(len(part.rows_P), device=part_T.device)
            inside_T = place_T[part_T]
            rows_P = (inside_T >= 0).nonzero()[:, 0]
            lesson = part.lesson.rows(inside_T[rows_P])
            parts.append(dataclasses.replace(part, rows_P=rows_P, lesson=lesson))
        return MixedLesson(tuple(part for part in parts if len(part.rows_P)) or tuple(parts[:1]))

    @property
    def tokens(self) -> int:
        return sum(len(part.rows_P) for part in self.parts)

    @property
    def head(self) -> OutputLayer:
        """One of the output layers; all of them have one split of one vocabulary."""
        return self.parts[0].lesson.head

    def logits(self) -> Tensor:
        """[T, W], where all of them know the whole distribution."""
        return torch.cat([part.lesson.logits() for part in self.parts])[self._order_T()]

    def selected(self, labels_T: Tensor) -> Lesson:
        """The most likely entries of all of them as one lesson."""
        lessons = [
            part.lesson.selected(labels_T[part.rows_P]) if isinstance(part.lesson, WholeLesson) else part.lesson
            for part in self.parts
        ]
        return join(lessons).rows(self._order_T())

    def _order_T(self) -> Tensor:
        return torch.cat([part.rows_P for part in self.parts]).argsort()


def parts_of(lesson: Lesson | WholeLesson | MixedLesson, labels_T: Tensor) -> tuple[Part, ...]:
    """The parts of any lesson about these tokens, with hidden states gathered.

    Collectives: an all-gather of each part's that are spread.
    """
    parts = lesson.parts if isinstance(lesson, MixedLesson) else None
    if parts is None:
        parts = (Part(torch.arange(len(labels_T), device=labels_T.device), lesson),)
    return tuple(
        dataclasses.replace(part, lesson=part.lesson.gathered()) if isinstance(part.lesson, WholeLesson) else part
        for part in parts
    )
