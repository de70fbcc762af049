"""Held-out metrics of a student: losses, agreement with the teacher, calibration.

Legend: T supervised tokens of a micro-batch.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.config import Loss
from megakd.kernels.predictions import Predictions, predict
from megakd.losses import SUMS, means, objective
from megakd.models.forward_only import forward_only
from megakd.models.gpt import GPT
from megakd.models.groups import is_last_stage
from megakd.models.micro_batch import MicroBatch
from megakd.teachers.lesson import Lesson, TeacherSource, no_lesson
from megakd.training.step import compare, reduce_sums

BINS = 15


@dataclasses.dataclass
class Evaluation:
    """What is compared on held-out batches.

    Attributes:
        student: the model judged.
        teacher: None judges the student alone.
        loss: which divergence is reported as `kd`, and what `loss` is.
        groups: the run's process groups.
    """

    student: GPT
    teacher: TeacherSource | None
    loss: Loss
    groups: object

    def __call__(
        self, batches: Iterable[list[MicroBatch]], device, stopping: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """Average over all supervised tokens of all batches.

        Args:
            batches: this data-parallel rank's micro-batches, the same number on every rank.
            stopping: asked before each batch, on all ranks alike; True gives up, and None is returned.
        Returns:
            Means as in training, with `perplexity` (of CE), `accuracy` (of the next token) and `ece` (expected
            calibration error of the most likely token, 15 equal bins, arXiv:1706.04599), and those bins as
            `calibration`; equal on all ranks.
        Collectives: those of the models; one all-reduce and one broadcast at the end.
        """
        totals = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
        bins_3N = torch.zeros(3, BINS, dtype=torch.float64, device=device)
        for micro_batches in batches:
            if stopping():
                return None
            for sums, batch_bins_3N in self.judge(micro_batches):
                totals += sums
                bins_3N += batch_bins_3N
        totals = reduce_sums([totals] if is_last_stage(self.groups) else [], self.groups, device)
        metrics = means(totals, self.teacher is not None)
        metrics |= calibration(share_bins(bins_3N, self.groups))
        if "ce" in metrics:
            metrics["perplexity"] = math.exp(min(metrics["ce"], 700.0))
        return metrics

    def judge(self, micro_batches: list[MicroBatch]) -> list[tuple[Tensor, Tensor]]:
        if self.teacher is None:
            lessons = [no_lesson(len(m.labels_T), m.ids_BS.device) for m in micro_batches]
        else:
            lessons = self.teacher.lessons(micro_batches)
        order = iter(lessons)

        def keep(hidden_SBH: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
            lesson, student = next(order), self.student
            block = student.block_tokens(self.loss.logits_memory_budget_bytes)
            every = torch.arange(len(micro_batch.labels_T), device=micro_batch.labels_T.device)
            totals = [self.judge_rows(hidden_SBH, micro_batch, lesson, part) for part in every.split(block)]
            return sum(sums for sums, _ in totals), sum(bins for _, bins in totals)

        return forward_only(self.student, micro_batches, keep, self.groups)

    def judge_rows(
        self, hidden_SBH: Tensor, micro_batch: MicroBatch, lesson: Lesson, part_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sums and bins of some of a micro-batch's supervised tokens."""
        labels_T, shard = micro_batch.labels_T[part_T], self.student.shard
        logits_TW = self.student.logits(hidden_SBH, micro_batch.rows_T[part_T])
        targets = lesson.targets.rows(part_T)
        _, sums = objective(logits_TW, targets, labels_T, shard, self.loss, inplace_backward=False)
        said = predict(logits_TW, labels_T, shard)
        if self.teacher is not None:
            here = Lesson(targets, lesson.label_logprob_T[part_T], lesson.id_T[part_T])
            compare(sums, said.id_T, here)
        return sums, bin_predictions(said, labels_T)


def bin_predictions(said: Predictions, labels_T: Tensor) -> Tensor:
    """[3, BINS]: how many predictions have a confidence in each bin, their summed confidence, how many are right."""
    confidence_T = said.logprob_T.double().exp()
    bin_T = (confidence_T * BINS).long().clamp(0, BINS - 1)
    rows_3T = torch.stack([torch.ones_like(confidence_T), confidence_T, (said.id_T == labels_T).double()])
    return torch.zeros(3, BINS, dtype=torch.float64, device=bin_T.device).index_add_(1, bin_T, rows_3T)


def share_bins(bins_3N: Tensor, groups) -> Tensor:
    if is_last_stage(groups):
        dist.all_reduce(bins_3N, group=groups.dp_cp)
    if groups.pp.size() > 1:
        dist.broadcast(bins_3N, group=groups.pp, group_src=groups.pp.size() - 1)
    return bins_3N


def calibration(bins_3N: Tensor) -> dict[str, float | dict[str, list]]:
    """Accuracy, the mean distance between confidence and accuracy over the bins by their tokens, and the bins.

    Of each bin: how many tokens it holds, the sum of their confidence, and how many of them are right.
    """
    count_N, confidence_N, right_N = bins_3N
    tokens = float(count_N.sum())
    if tokens == 0:
        return {}
    bins = {
        "tokens": count_N.long().tolist(),
        "confidence": [round(value, 4) for value in confidence_N.tolist()],
        "right": right_N.long().tolist(),
    }
    error = float((confidence_N - right_N).abs().sum()) / tokens
    return {"accuracy": float(right_N.sum()) / tokens, "ece": error, "calibration": bins}
