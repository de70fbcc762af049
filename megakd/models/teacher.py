"""Teachers: where the targets of a step come from. Loss and loop cannot tell the sources apart.

Legend: T supervised tokens of a micro-batch, K entries of the teacher's distribution.
"""

import dataclasses
from typing import Protocol

import torch
from torch import Tensor

from megakd.kernels import select_top_k
from megakd.kernels.predictions import predict
from megakd.models.forward_only import forward_only
from megakd.models.gpt import GPT
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


class TeacherSource(Protocol):
    """Anything that gives lessons for the micro-batches of a step, in order, on the last pipeline stage."""

    def lessons(self, micro_batches: list[MicroBatch]) -> list[Lesson]: ...


class OnlineTeacher:
    """A frozen model in the student's own layout, run forward-only over all micro-batches before the student starts.

    Its logits are reduced to top-K targets micro-batch by micro-batch (about 8 * K bytes a token), so pipelines and
    their overlap are the student's alone and carry nothing of the teacher.

    Args:
        gpt: the teacher; its parameters are frozen here.
        top_k, temperature: what `select_top_k` keeps.
        groups: the process groups both models share.
    """

    def __init__(self, gpt: GPT, *, top_k: int, temperature: float, groups):
        self.gpt = gpt.requires_grad_(False).eval()
        self.top_k, self.temperature, self.groups = top_k, temperature, groups

    def lessons(self, micro_batches: list[MicroBatch]) -> list[Lesson]:
        return forward_only(self.gpt, micro_batches, self._reduce, self.groups)

    def _reduce(self, hidden_SBH: Tensor, micro_batch: MicroBatch) -> Lesson:
        logits_TW = self.gpt.logits(hidden_SBH, micro_batch.rows_T)
        said = predict(logits_TW, micro_batch.labels_T, self.gpt.shard)
        targets = select_top_k(logits_TW, self.top_k, self.gpt.shard, self.temperature)
        return Lesson(targets, said.label_logprob_T, said.id_T)


def no_lesson(tokens: int, device) -> Lesson:
    """The lesson of plain training: no entries, all mass in the tail; only ce_weight may be above 0 with it."""
    none = TeacherTargets(
        torch.empty(tokens, 0, dtype=torch.int64, device=device),
        torch.empty(tokens, 0, device=device),
        torch.zeros(tokens, device=device),
    )
    return Lesson(none, torch.zeros(tokens, device=device), torch.full((tokens,), -1, device=device))
