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
from megakd.kernels import select_top_k
from megakd.kernels.dense import NotFiniteError, dense_kd_loss
from megakd.kernels.predictions import Predictions, predict
from megakd.losses import SUMS, means, means_by_name, summed
from megakd.models.forward_only import forward_only
from megakd.models.gpt import GPT
from megakd.models.groups import is_last_stage
from megakd.models.micro_batch import MicroBatch
from megakd.teachers.lesson import TeacherSource, no_lesson, not_finite
from megakd.teachers.mixed import Part, parts_of
from megakd.teachers.whole_lesson import WholeLesson
from megakd.training.head_loss import block_tokens_of, compare
from megakd.training.step import reduce_sums

BINS = 15
MOST_LIKELY = 5  # ids that top5_agreement compares
EXACT = ("forward_kl", "reverse_kl", "top5_agreement", "exact_tokens", "bytes")


@dataclasses.dataclass
class Evaluation:
    """What is compared on held-out batches.

    Attributes:
        student: the model judged.
        teacher: None judges the student alone.
        loss: which divergence is reported as `kd`, and what `loss` is.
        groups: the run's process groups.
        id_bytes_V: bytes that each id adds to a text, float64 on the models' device; None leaves bits per byte out.
    """

    student: GPT
    teacher: TeacherSource | None
    loss: Loss
    groups: object
    id_bytes_V: Tensor | None = None

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
            `calibration`; equal on all ranks. With a WholeTeacher, whatever the loss compares, also `forward_kl` and
            `reverse_kl` over the whole vocabulary at temperature 1, and `top5_agreement`; with id_bytes_V
            `bits_per_byte`.
        Collectives: those of the models; three all-reduces and as many broadcasts at the end.
        """
        names = getattr(self.teacher, "names", [])
        totals = torch.zeros(1 + len(names), len(SUMS), dtype=torch.float64, device=device)
        bins_3N = torch.zeros(3, BINS, dtype=torch.float64, device=device)
        exact = torch.zeros(len(EXACT), dtype=torch.float64, device=device)
        for micro_batches in batches:
            if stopping():
                return None
            for sums, batch_bins_3N, batch_exact in self.judge(micro_batches):
                totals += sums
                bins_3N += batch_bins_3N
                exact += batch_exact
        totals = reduce_sums([totals] if is_last_stage(self.groups) else [], self.groups, device, len(names))
        metrics = means(totals[0], self.teacher is not None) | means_by_name(totals, names)
        metrics |= calibration(share(bins_3N, self.groups))
        by_name = dict(zip(EXACT, share(exact, self.groups).tolist(), strict=True))
        if by_name["exact_tokens"]:
            metrics |= {name: by_name[name] / by_name["exact_tokens"] for name in EXACT[:3]}
        if "ce" in metrics:
            metrics["perplexity"] = math.exp(min(metrics["ce"], 700.0))
            if by_name["bytes"]:
                metrics["bits_per_byte"] = metrics["ce"] * metrics["tokens"] / math.log(2) / by_name["bytes"]
        return metrics

    def judge(self, micro_batches: list[MicroBatch]) -> list[tuple[Tensor, Tensor, Tensor]]:
        if self.teacher is None:
            lessons = [no_lesson(len(m.labels_T), m.ids_BS.device) for m in micro_batches]
        else:
            lessons = self.teacher.lessons(micro_batches)
        order = iter(lessons)

        def keep(hidden_SBH: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
            totals = []
            for part in parts_of(next(order), micro_batch.labels_T):
                heads = [part.lesson.head] if isinstance(part.lesson, WholeLesson) else []
                block = block_tokens_of(self.loss, self.student, *heads)
                every = torch.arange(len(part.rows_P), device=part.rows_P.device)
                for block_B in every.split(block):
                    here = dataclasses.replace(part, rows_P=part.rows_P[block_B], lesson=part.lesson.rows(block_B))
                    totals.append(self.judge_rows(hidden_SBH, micro_batch, here))
            return tuple(sum(parts) for parts in zip(*totals, strict=True))

        return forward_only(self.student, micro_batches, keep, self.groups)

    @torch.no_grad()
    def judge_rows(self, hidden_SBH: Tensor, micro_batch: MicroBatch, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        """Sums (of all teachers, and of each with a name), bins and exact sums of some of the supervised tokens."""
        labels_T, shard = micro_batch.labels_T[part.rows_P], self.student.shard
        logits_TW = self.student.logits(hidden_SBH, micro_batch.rows_T[part.rows_P])
        here, loss = part.lesson, part.loss(self.loss)
        exact = torch.zeros(len(EXACT), dtype=torch.float64, device=labels_T.device)
        losses = None
        if isinstance(here, WholeLesson):
            teacher_TW = here.logits()
            exact[:3] = self.compare_whole(logits_TW, teacher_TW, labels_T)
            exact[3] = len(labels_T)
            if loss.targets != "top_k":
                losses = here.losses(logits_TW, labels_T, shard, loss, teacher_TW)
            here = here.selected(labels_T, teacher_TW)
        _, own = summed(losses or here.losses(logits_TW, labels_T, shard, loss), labels_T, None)
        said = predict(logits_TW, labels_T, shard)
        if self.teacher is not None:
            compare(own, said.id_T, here.id_T, here.label_logprob_T)
        sums = own.new_zeros(1 + len(getattr(self.teacher, "names", [])), len(own))
        for row in part.counted:
            sums[row] = own
        if self.id_bytes_V is not None:
            exact[4] = self.id_bytes_V[labels_T].sum()
        return sums, bin_predictions(said, labels_T), exact

    def compare_whole(self, logits_TW: Tensor, teacher_TW: Tensor, labels_T: Tensor) -> Tensor:
        """Sums of KL(teacher, student), KL(student, teacher), and the share of the 5 likeliest ids that both have."""
        shard, kls = self.student.shard, []
        for name in EXACT[:2]:
            try:
                losses = dense_kd_loss(logits_TW, teacher_TW, labels_T, shard, divergence=name)
            except NotFiniteError as error:
                raise not_finite(error) from error
            kls.append(losses.kd_T.double().sum())
        most = min(MOST_LIKELY, shard.size)
        ours_TK, theirs_TK = (select_top_k(x_TW, most, shard, gather=True).ids_TK for x_TW in (logits_TW, teacher_TW))
        common_T = (ours_TK[:, :, None] == theirs_TK[:, None]).any(2).double().mean(1)
        return torch.stack([*kls, common_T.sum()])


def bin_predictions(said: Predictions, labels_T: Tensor) -> Tensor:
    """[3, BINS]: how many predictions have a confidence in each bin, their summed confidence, how many are right."""
    confidence_T = said.logprob_T.double().exp()
    bin_T = (confidence_T * BINS).long().clamp(0, BINS - 1)
    rows_3T = torch.stack([torch.ones_like(confidence_T), confidence_T, (said.id_T == labels_T).double()])
    return torch.zeros(3, BINS, dtype=torch.float64, device=bin_T.device).index_add_(1, bin_T, rows_3T)


def share(sums: Tensor, groups) -> Tensor:
    """Sums of the last stage over data-parallel ranks, on every rank; in place."""
    if is_last_stage(groups):
        dist.all_reduce(sums, group=groups.dp_cp)
    if groups.pp.size() > 1:
        dist.broadcast(sums, group=groups.pp, group_src=groups.pp.size() - 1)
    return sums


def id_bytes(tokenizer, device) -> Tensor:
    """Bytes that each id adds to a text, float64 [V]; none for special tokens."""
    sizes = [0 if tokenizer.is_special(i) else len(tokenizer.id_to_bytes(i)) for i in range(tokenizer.vocab_size)]
    return torch.tensor(sizes, dtype=torch.float64, device=device)


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
