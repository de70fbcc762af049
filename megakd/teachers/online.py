"""A teacher that runs beside the student.

Legend: T supervised tokens of a micro-batch, S sequence, B micro-batch, H hidden, W vocabulary columns of this rank.
"""

import contextlib

import torch.distributed as dist
from torch import Tensor

from megakd.kernels.selection import select_and_predict
from megakd.models.forward_only import forward_only
from megakd.models.gpt import GPT
from megakd.models.micro_batch import MicroBatch
from megakd.models.offload import Offload
from megakd.models.output_layer import OutputLayer
from megakd.models.wider import of_all_students
from megakd.teachers.lesson import Lesson, join, not_finite


class OnlineTeacher:
    """A frozen model on the student's ranks, run forward-only over all micro-batches before the student starts.

    Its logits are reduced to top-K targets micro-batch by micro-batch (about 8 * K bytes a token), so pipelines and
    their overlap are the student's alone and carry nothing of the teacher.

    Args:
        gpt: the teacher; its parameters are frozen here.
        top_k, temperature: what `select_top_k` keeps.
        groups: the student's.
        budget_bytes: of logits that may exist at one time.
        offload: brings the weights where they rest in host memory; None: they are on the device.
        sharing: ranks of other student replicas at this rank's place, where the teacher's ranks are those of several
            (megakd.models.wider): all of its ranks then run what each of them is given. None: it has no more than this
            replica's.
    """

    def __init__(
        self,
        gpt: GPT,
        *,
        top_k: int,
        temperature: float,
        groups,
        budget_bytes: int = 4 << 30,
        offload: Offload | None = None,
        sharing: dist.ProcessGroup | None = None,
    ):
        self.gpt, self.budget_bytes = gpt.requires_grad_(False).eval(), budget_bytes
        self.top_k, self.temperature, self.groups, self.step = top_k, temperature, groups, 0
        self.offload, self.sharing = offload, sharing

    @property
    def heads(self) -> list[OutputLayer]:
        """Its output layer, on the last stage."""
        return [self.gpt]

    def lessons(self, micro_batches: list[MicroBatch], step: int = 0) -> list[Lesson]:
        """As of a TeacherSource.

        Raises:
            TrainingError: its logits are not finite; on all ranks of the student's replica alike.
        Collectives: those of the model; and of `of_all_students` where replicas share it.
        """
        self.step = step
        everyones = micro_batches if self.sharing is None else of_all_students(micro_batches, self.sharing)
        own = {id(micro_batch) for micro_batch in micro_batches}

        def keep(hidden_SBH: Tensor, micro_batch: MicroBatch):
            return self._reduce(hidden_SBH, micro_batch) if id(micro_batch) in own else None

        try:
            with self.offload or contextlib.nullcontext():
                said = forward_only(self.gpt, everyones, keep, self.groups)
        except ValueError as error:
            raise not_finite(error) from error
        return [lesson for lesson in said if lesson is not None]

    def _reduce(self, hidden_SBH: Tensor, micro_batch: MicroBatch) -> Lesson:
        block = self.gpt.block_tokens(self.budget_bytes)
        rows, labels = micro_batch.rows_T.split(block), micro_batch.labels_T.split(block)
        return join([self._lesson(hidden_SBH, *part) for part in zip(rows, labels, strict=True)])

    def _lesson(self, hidden_SBH: Tensor, rows_T: Tensor, labels_T: Tensor) -> Lesson:
        logits_TW = self.gpt.logits(hidden_SBH, rows_T)
        targets, said = select_and_predict(logits_TW, labels_T, self.top_k, self.gpt.shard, self.temperature)
        return Lesson(targets, said.label_logprob_T, said.id_T)
