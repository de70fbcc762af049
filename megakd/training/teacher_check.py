"""Whether the teacher is one: before the first update, against counting words and against the student.

A teacher whose output layer was not loaded, with another base of its rotary embedding or with another tokenizer trains
a student all the same, and what it costs shows days later. What it predicts of the first batch shows it at once.
"""

import dataclasses
import math

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.errors import TrainingError
from megakd.models.micro_batch import MicroBatch

MARGIN_NATS = 0.05  # between teacher and student: dropout in one of them, rounding in a copy of the other


@dataclasses.dataclass(frozen=True)
class TeacherCheck:
    """Compares cross-entropies of one batch; called with a step's averages before its update.

    Args:
        micro_batches: this data-parallel rank's.
        vocab_size: of the tokenizer.
        source: the teacher's folder, for messages.
        fresh: the student is at its first step. Later it may well have overtaken its teacher on this data.
        group: data-parallel ranks.
        named: name and folder of each of several teachers, which are judged by the tokens that they teach.
    """

    micro_batches: list[MicroBatch]
    vocab_size: int
    source: str
    fresh: bool
    group: object
    named: tuple[tuple[str, str], ...] = ()

    def __call__(self, metrics: dict[str, float]) -> None:
        """Raises TrainingError, on every rank, where a teacher is worse than what knows nothing of it.

        Collectives: for each teacher one all-reduce of 8 bytes an id over the group, if the batch shows its
            cross-entropy.
        """
        if not self.named:
            labels = [micro_batch.labels_T for micro_batch in self.micro_batches]
            self.judge(metrics.get("teacher_ce"), metrics["ce"], labels, self.source)
        for number, (name, source) in enumerate(self.named):
            labels = [micro_batch.labels_T[micro_batch.teachers_T == number] for micro_batch in self.micro_batches]
            self.judge(metrics.get(f"{name}/teacher_ce"), metrics.get(f"{name}/ce"), labels, f"{name} ({source})")

    def judge(self, teacher: float | None, student: float | None, labels: list[Tensor], source: str) -> None:
        """One teacher, by the cross-entropies of both models on the tokens with these labels on this rank."""
        if teacher is None:  # a recording without the data's tokens, or nothing of its sources in this batch
            return
        labels_T = torch.cat(labels)
        counts_V = torch.bincount(labels_T, minlength=self.vocab_size)
        dist.all_reduce(counts_V, group=self.group)
        counted = counted_nats(counts_V)
        if not teacher < counted:
            raise TrainingError(
                f"the teacher's cross-entropy on the first batch is {teacher:.3f} nats; counting how often each token "
                f"occurs in it gives {counted:.3f} (guessing: {math.log(len(counts_V)):.3f}): {source} knows "
                "nothing about this data",
                hint="check that the teacher is trained, of this tokenizer and wholly loaded "
                "(docs/is-my-run-right.md), or set teacher.allow_weak=true to learn from it all the same",
            )
        if self.fresh and teacher > student + MARGIN_NATS:
            raise TrainingError(
                f"the teacher's cross-entropy on the first batch is {teacher:.3f} nats, the student's before any "
                f"update {student:.3f}: {source} has nothing to teach this student about this data",
                hint="is it the right teacher, converted with the right config (docs/is-my-run-right.md)? "
                "Set teacher.allow_weak=true to learn from it all the same",
            )


def counted_nats(counts_V: Tensor) -> float:
    """Mean -log p of tokens, each predicted from how often its id occurs among the others.

    The plain entropy of the counts would be too good a score for a small batch, in which most tokens occur once: it has
    seen the token that it predicts. Here that one is left out, and tokens not seen among the others share the
    probability that a token is such (their share of the batch) evenly over the vocabulary.

    Args:
        counts_V: int, how often each id occurs.
    """
    counts_V = counts_V.double()
    total = counts_V.sum()
    once = (counts_V == 1).sum() / total
    seen_V = counts_V[counts_V > 0]
    others_V = (seen_V - 1) / (total - 1).clamp(min=1)
    probabilities_V = (1 - once) * others_V + once / len(counts_V)
    return float(-(seen_V * probabilities_V.clamp(min=1 / len(counts_V) / total).log()).sum() / total)
