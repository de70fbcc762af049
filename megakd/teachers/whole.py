"""A live teacher whose whole distribution is wanted as well: its final hidden rows are kept, 2 * H bytes a token.

Legend: T supervised tokens of a micro-batch, S sequence, B micro-batch, H hidden, W vocabulary columns of this rank.
"""

from torch import Tensor

from megakd.models.micro_batch import MicroBatch
from megakd.models.sharding import gather_head
from megakd.teachers.lesson import Lesson
from megakd.teachers.online import OnlineTeacher


class WholeTeacher(OnlineTeacher):
    """An online teacher that keeps what its head is given.

    Attributes:
        rows: of each micro-batch of the last call of `lessons`, on the last stage: [T, H], whole on every tensor
            parallel rank.
    """

    rows: list[Tensor]

    @classmethod
    def of(cls, teacher: OnlineTeacher) -> "WholeTeacher":
        """The same teacher."""
        return cls(
            teacher.gpt,
            top_k=teacher.top_k,
            temperature=teacher.temperature,
            groups=teacher.groups,
            budget_bytes=teacher.budget_bytes,
        )

    def lessons(self, micro_batches: list[MicroBatch]) -> list[Lesson]:
        """As of an online teacher; fills `rows`."""
        self.rows = []
        lessons = super().lessons(micro_batches)
        gather_head(self.gpt)
        return lessons

    def logits(self, rows_TH: Tensor) -> Tensor:
        """[T, W]: this rank's columns for some of the kept rows."""
        return self.gpt.logits_of(rows_TH)

    def _reduce(self, hidden_SBH: Tensor, micro_batch: MicroBatch) -> Lesson:
        self.rows.append(self.gpt.head_input(hidden_SBH, micro_batch.rows_T))
        return super()._reduce(hidden_SBH, micro_batch)
