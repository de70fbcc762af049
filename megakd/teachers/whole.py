"""A live teacher whose whole distribution is wanted: its final hidden rows are kept, 2 * H bytes a token in 16 bits.

Legend: T supervised tokens of a micro-batch, S sequence, B micro-batch, H hidden, W vocabulary columns of this rank.
"""

import dataclasses

from torch import Tensor

from megakd.config import Loss
from megakd.kernels import KDLoss, VocabShard, dense_kd_loss
from megakd.kernels.dense import NotFiniteError
from megakd.kernels.selection import select_and_predict
from megakd.losses import whole_options
from megakd.models.gpt import GPT
from megakd.models.micro_batch import MicroBatch
from megakd.models.offload import Offload
from megakd.models.sharding import gather_head
from megakd.teachers.lesson import Lesson, TeacherSource, join
from megakd.teachers.online import OnlineTeacher, not_finite
from megakd.teachers.sampled import SampledTeacher


@dataclasses.dataclass(frozen=True)
class WholeLesson:
    """A teacher's distribution over the whole vocabulary at the supervised tokens of one micro-batch.

    Attributes:
        hidden_TH: what its output layer is given, whole on every tensor-parallel rank.
        gpt: the teacher.
        top_k, temperature: of the entries that `selected` chooses.
        budget_bytes: of logits that may exist at one time.
    """

    hidden_TH: Tensor
    gpt: GPT
    top_k: int
    temperature: float
    budget_bytes: int

    def rows(self, part_T: Tensor) -> "WholeLesson":
        """About some of the tokens."""
        return dataclasses.replace(self, hidden_TH=self.hidden_TH[part_T])

    def logits(self) -> Tensor:
        """[T, W]: this rank's columns."""
        return self.gpt.logits_of(self.hidden_TH)

    def selected(self, labels_T: Tensor, logits_TW: Tensor | None = None) -> Lesson:
        """Its most likely entries, and what else a lesson says; `logits_TW`: `logits()`, if they are there."""
        if logits_TW is None:
            block = self.gpt.block_tokens(self.budget_bytes)
            parts = zip(self.hidden_TH.split(block), labels_T.split(block), strict=True)
            return join([self._selected(self.gpt.logits_of(hidden_BH), labels_B) for hidden_BH, labels_B in parts])
        return self._selected(logits_TW, labels_T)

    def _selected(self, logits_TW: Tensor, labels_T: Tensor) -> Lesson:
        targets, said = select_and_predict(logits_TW, labels_T, self.top_k, self.gpt.shard, self.temperature)
        return Lesson(targets, said.label_logprob_T, said.id_T)

    def losses(
        self, logits_TW: Tensor, labels_T: Tensor, shard: VocabShard, loss: Loss, teacher_TW: Tensor | None = None
    ) -> KDLoss:
        """Of the student's logits, against the whole distribution; without gradient.

        Args:
            teacher_TW: `logits()`, if they are there.
        Raises:
            TrainingError: the teacher's are not finite; on every rank of the model.
        """
        teacher_TW = self.logits() if teacher_TW is None else teacher_TW
        try:
            return dense_kd_loss(logits_TW.detach(), teacher_TW, labels_T, shard, **whole_options(loss))
        except NotFiniteError as error:
            raise not_finite(error) from error


class WholeTeacher(OnlineTeacher):
    """An online teacher that keeps what its head is given, and no logits at all."""

    @classmethod
    def of(cls, teacher: OnlineTeacher) -> "WholeTeacher":
        """The same teacher."""
        return cls(
            teacher.gpt,
            top_k=teacher.top_k,
            temperature=teacher.temperature,
            groups=teacher.groups,
            budget_bytes=teacher.budget_bytes,
            offload=teacher.offload,
        )

    def lessons(self, micro_batches: list[MicroBatch], step: int = 0) -> list[WholeLesson]:
        """As of an online teacher, whose head stays whole where its weights are sharded, and on the device where the
        others leave it."""
        lessons = super().lessons(micro_batches, step)
        gather_head(self.gpt)
        if self.offload:
            self.offload.fetch_rest()
        return lessons

    def _reduce(self, hidden_SBH: Tensor, micro_batch: MicroBatch) -> WholeLesson:
        hidden_TH = self.gpt.head_input(hidden_SBH, micro_batch.rows_T)
        return WholeLesson(hidden_TH, self.gpt, self.top_k, self.temperature, self.budget_bytes)


def live_teacher(gpt: GPT, loss: Loss, groups, seed: int, offload: Offload | None = None) -> OnlineTeacher:
    """The live teacher that the loss section compares with; `seed` of the run, for draws."""
    budget = loss.logits_memory_budget_bytes
    common = dict(top_k=loss.top_k, temperature=loss.temperature, groups=groups, budget_bytes=budget, offload=offload)
    if loss.targets == "sampled":
        return SampledTeacher(gpt, draws=loss.draws, seed=seed, **common)
    return (WholeTeacher if loss.targets == "whole" else OnlineTeacher)(gpt, **common)


def judging(teacher: TeacherSource | None) -> TeacherSource | None:
    """The teacher as validation compares with it: draws stand for the whole distribution, which is taken instead."""
    return WholeTeacher.of(teacher) if isinstance(teacher, SampledTeacher) else teacher
