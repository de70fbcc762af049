"""A live teacher whose whole distribution is wanted: its final hidden rows are kept, 2 * H bytes a token in 16 bits.

Legend: T supervised tokens of a micro-batch, S sequence, B micro-batch, H hidden.
"""

from torch import Tensor

from megakd.config import Loss
from megakd.models.gpt import GPT
from megakd.models.micro_batch import MicroBatch
from megakd.models.sharding import gather_head
from megakd.teachers.lesson import TeacherSource
from megakd.teachers.online import OnlineTeacher
from megakd.teachers.recorded import RecordedTeacher
from megakd.teachers.sampled import SampledTeacher
from megakd.teachers.several import SeveralTeachers
from megakd.teachers.whole_lesson import Spread, WholeLesson


class WholeTeacher(OnlineTeacher):
    """An online teacher that keeps what its head is given, and no logits at all.

    Of a step of several micro-batches each tensor-parallel rank keeps its share, until the loss of one needs them.
    """

    spread = False

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
            sharing=teacher.sharing,
        )

    def lessons(self, micro_batches: list[MicroBatch], step: int = 0) -> list[WholeLesson]:
        """As of an online teacher, whose head stays whole where its weights are sharded, and on the device where the
        others leave it."""
        self.spread = len(micro_batches) > 1
        lessons = super().lessons(micro_batches, step)
        gather_head(self.gpt)
        if self.offload:
            self.offload.fetch_rest()
        return lessons

    def _reduce(self, hidden_SBH: Tensor, micro_batch: MicroBatch) -> WholeLesson:
        hidden_TH = self.gpt.head_input(hidden_SBH, micro_batch.rows_T)
        if self.spread:
            hidden_TH = Spread.of(hidden_TH, self.gpt.shard)
        return WholeLesson(hidden_TH, self.gpt, self.top_k, self.temperature, self.budget_bytes)


def live_teacher(gpt: GPT, loss: Loss, groups, seed: int, **how) -> OnlineTeacher:
    """The live teacher that the loss section compares with.

    Args:
        seed: of the run, for draws.
        how: `offload` and `sharing` of an online teacher.
    """
    budget = loss.logits_memory_budget_bytes
    common = dict(top_k=loss.top_k, temperature=loss.temperature, groups=groups, budget_bytes=budget, **how)
    if loss.targets == "sampled":
        return SampledTeacher(gpt, draws=loss.draws, seed=seed, **common)
    return (WholeTeacher if loss.targets == "whole" else OnlineTeacher)(gpt, **common)


def judging(teacher: TeacherSource | None) -> TeacherSource | None:
    """The teacher as validation compares with it: draws stand for the whole distribution, which is taken instead."""
    one = teacher.teachers[0] if isinstance(teacher, SeveralTeachers) else teacher
    draws = isinstance(one, SampledTeacher) or (isinstance(one, RecordedTeacher) and one.draws)
    return whole_of(teacher) if draws else teacher


def whole_of(teacher: TeacherSource | None) -> TeacherSource | None:
    """The same teacher, giving its whole distribution where it knows it."""
    if isinstance(teacher, SeveralTeachers):
        whole = [WholeTeacher.of(one) for one in teacher.teachers]
        return SeveralTeachers(whole, teacher.names, teacher.weights, teacher.groups)
    if isinstance(teacher, OnlineTeacher):
        return WholeTeacher.of(teacher)
    return teacher.whole() if isinstance(teacher, RecordedTeacher) else teacher
