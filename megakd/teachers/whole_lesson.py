"""What a teacher says whose whole distribution is known, by its last hidden states and its output layer.

Legend: T supervised tokens of a micro-batch, H hidden, W vocabulary columns of this rank.
"""

import dataclasses

from torch import Tensor

from megakd.config import Loss
from megakd.kernels import KDLoss, VocabShard, dense_kd_loss
from megakd.kernels.dense import NotFiniteError
from megakd.kernels.selection import select_and_predict
from megakd.losses import whole_options
from megakd.models.output_layer import OutputLayer
from megakd.teachers.lesson import Lesson, join, not_finite


@dataclasses.dataclass(frozen=True)
class WholeLesson:
    """A teacher's distribution over the whole vocabulary at the supervised tokens of one micro-batch.

    Attributes:
        hidden_TH: what its output layer is given, whole on every tensor-parallel rank.
        head: the output layer.
        top_k, temperature: of the entries that `selected` chooses.
        budget_bytes: of logits that may exist at one time.
    """

    hidden_TH: Tensor
    head: OutputLayer
    top_k: int
    temperature: float
    budget_bytes: int

    def rows(self, part_T: Tensor) -> "WholeLesson":
        """About some of the tokens."""
        return dataclasses.replace(self, hidden_TH=self.hidden_TH[part_T])

    def logits(self) -> Tensor:
        """[T, W]: this rank's columns."""
        return self.head.logits_of(self.hidden_TH)

    def selected(self, labels_T: Tensor, logits_TW: Tensor | None = None) -> Lesson:
        """Its most likely entries, and what else a lesson says; `logits_TW`: `logits()`, if they are there."""
        if logits_TW is None:
            block = self.head.block_tokens(self.budget_bytes)
            parts = zip(self.hidden_TH.split(block), labels_T.split(block), strict=True)
            return join([self._selected(self.head.logits_of(hidden_BH), labels_B) for hidden_BH, labels_B in parts])
        return self._selected(logits_TW, labels_T)

    def _selected(self, logits_TW: Tensor, labels_T: Tensor) -> Lesson:
        targets, said = select_and_predict(logits_TW, labels_T, self.top_k, self.head.shard, self.temperature)
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
