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
class Spread:
    """Rows that tensor-parallel ranks keep a part of each, so that a step's take no more room than they must.

    Attributes:
        own_PH: this rank's, as many as any other's; the last rank's are filled up.
        tokens: T, of all ranks.
        shard: whose ranks they are.
    """

    own_PH: Tensor
    tokens: int
    shard: VocabShard

    @classmethod
    def of(cls, whole_TH: Tensor, shard: VocabShard) -> "Spread | Tensor":
        """This rank's part of rows that all of them have; those themselves for a single rank."""
        if shard.ranks == 1:
            return whole_TH
        each = -(-len(whole_TH) // shard.ranks)
        own_PH = whole_TH.new_zeros((each, whole_TH.shape[1]))
        mine_PH = whole_TH[shard.rank * each : (shard.rank + 1) * each]
        own_PH[: len(mine_PH)] = mine_PH
        return cls(own_PH, len(whole_TH), shard)

    def to(self, device) -> "Spread":
        return dataclasses.replace(self, own_PH=self.own_PH.to(device))

    def gathered(self) -> Tensor:
        """[T, H]. Collectives: one all-gather, none for no tokens."""
        if not self.tokens:
            return self.own_PH
        return self.shard.all_gather(self.own_PH).flatten(0, 1)[: self.tokens]


@dataclasses.dataclass(frozen=True)
class WholeLesson:
    """A teacher's distribution over the whole vocabulary at the supervised tokens of one micro-batch.

    Attributes:
        hidden_TH: what its output layer is given, whole on every tensor-parallel rank, or spread over them until
            `gathered`, with which all that reads it begins.
        head: the output layer.
        top_k, temperature: of the entries that `selected` chooses.
        budget_bytes: of logits that may exist at one time.
    """

    hidden_TH: Tensor | Spread
    head: OutputLayer
    top_k: int
    temperature: float
    budget_bytes: int

    def gathered(self) -> "WholeLesson":
        """The same with whole hidden states. Collectives: an all-gather of them where they are spread."""
        if isinstance(self.hidden_TH, Tensor):
            return self
        return dataclasses.replace(self, hidden_TH=self.hidden_TH.gathered())

    def rows(self, part_T: Tensor) -> "WholeLesson":
        """About some of the tokens."""
        whole = self.gathered()
        return dataclasses.replace(whole, hidden_TH=whole.hidden_TH[part_T])

    def logits(self) -> Tensor:
        """[T, W]: this rank's columns."""
        return self.head.logits_of(self.gathered().hidden_TH)

    def selected(self, labels_T: Tensor, logits_TW: Tensor | None = None) -> Lesson:
        """Its most likely entries, and what else a lesson says; `logits_TW`: `logits()`, if they are there."""
        if logits_TW is None:
            block = self.head.block_tokens(self.budget_bytes)
            parts = zip(self.gathered().hidden_TH.split(block), labels_T.split(block), strict=True)
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
