"""The last part of a student's forward: its output layer and the loss of a micro-batch, apart or in blocks of tokens.

Legend: S sequence, B micro-batch or block, H hidden, T supervised tokens of one micro-batch, W vocabulary columns.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from megakd.config import Loss
from megakd.kernels import KDLoss
from megakd.kernels.dense import NotFiniteError
from megakd.kernels.predictions import predict
from megakd.losses import SUMS, fused_objective, objective, whole_objective
from megakd.models.gpt import GPT
from megakd.models.micro_batch import MicroBatch
from megakd.teachers.lesson import Lesson
from megakd.teachers.online import not_finite
from megakd.teachers.whole import WholeLesson

Rows = slice | Tensor  # some of the T tokens


@dataclasses.dataclass
class HeadLoss:
    """Megatron's loss function of one micro-batch.

    Attributes:
        gpt: the student.
        micro_batch, lesson, loss: of what, against what, by which numbers.
        tokens: of the whole micro-batch on this rank, supervised or not; see `is_fused`.
        compared: count agreement and the teacher's CE too (one more read of both models' logits).
        keep: is given the losses of every token.
    """

    gpt: GPT
    micro_batch: MicroBatch
    lesson: Lesson | WholeLesson
    loss: Loss
    tokens: int
    compared: bool
    keep: Callable[[KDLoss], None] | None

    def __call__(self, hidden_SBH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Summed loss, number of tokens, sums to report."""
        if isinstance(self.lesson, WholeLesson):
            loss_sum, sums = self.whole(hidden_SBH)
        elif is_fused(self.gpt, self.tokens, self.loss):
            loss_sum, sums = self.fused(hidden_SBH)
        else:
            loss_sum, sums = self.apart(hidden_SBH)
        return loss_sum, torch.tensor(len(self.micro_batch.labels_T), dtype=torch.int), sums

    def apart(self, hidden_SBH: Tensor) -> tuple[Tensor, Tensor]:
        """The output layer, then the loss."""
        gpt, lesson, labels_T = self.gpt, self.lesson, self.micro_batch.labels_T
        logits_TW = gpt.logits(hidden_SBH, self.micro_batch.rows_T)
        given = logits_TW, lesson.targets, labels_T, gpt.shard, self.loss
        loss_sum, sums = objective(*given, inplace_backward=True, keep=self.keep)
        if self.compared:
            said = predict(logits_TW.detach(), labels_T, gpt.shard)
            compare(sums, said.id_T, lesson.id_T, lesson.label_logprob_T)
        return loss_sum, sums

    def fused(self, hidden_SBH: Tensor) -> tuple[Tensor, Tensor]:
        """Both in blocks of tokens."""
        gpt, lesson, labels_T = self.gpt, self.lesson, self.micro_batch.labels_T
        ids: list[Tensor] = []

        def predict_rows(rows: Rows, logits_BW: Tensor) -> None:
            ids.append(predict(logits_BW, labels_T[rows], gpt.shard).id_T)

        loss_sum, sums = fused_objective(
            gpt.head_input(hidden_SBH, self.micro_batch.rows_T, whole_gradient=True),
            gpt.head_weight,
            lesson.targets,
            labels_T,
            gpt.shard,
            self.loss,
            softcap=gpt.softcap,
            block_tokens=gpt.block_tokens(self.loss.logits_memory_budget_bytes),
            on_logits=predict_rows if self.compared else None,
            keep=self.keep,
        )
        if ids:
            compare(sums, torch.cat(ids), lesson.id_T, lesson.label_logprob_T)
        return loss_sum, sums

    def whole(self, hidden_SBH: Tensor) -> tuple[Tensor, Tensor]:
        """Both models' output layers and the loss, in blocks of tokens.

        Raises:
            TrainingError: the teacher's logits are not finite; on every rank of the model.
        """
        gpt, teacher, labels_T = self.gpt, self.lesson.gpt, self.micro_batch.labels_T
        said: list[tuple[Tensor, Tensor, Tensor]] = []

        def predict_rows(rows: Rows, student_BW: Tensor, teacher_BW: Tensor) -> None:
            ours, theirs = (predict(x_BW, labels_T[rows], gpt.shard) for x_BW in (student_BW, teacher_BW))
            said.append((ours.id_T, theirs.id_T, theirs.label_logprob_T))

        try:
            loss_sum, sums = whole_objective(
                gpt.head_input(hidden_SBH, self.micro_batch.rows_T, whole_gradient=True),
                gpt.head_weight,
                self.lesson.hidden_TH,
                teacher.head_weight,
                labels_T,
                gpt.shard,
                self.loss,
                softcaps=(gpt.softcap, teacher.softcap),
                block_tokens=block_tokens_of(self.loss, gpt, teacher),
                on_logits=predict_rows if self.compared else None,
                keep=self.keep,
            )
        except NotFiniteError as error:
            raise not_finite(error) from error
        if said:
            compare(sums, *map(torch.cat, zip(*said, strict=True)))
        return loss_sum, sums


def is_fused(gpt: GPT, tokens: int, loss: Loss) -> bool:
    """Whether output layer and loss of a micro-batch are run together, in blocks of tokens.

    Args:
        tokens: of the whole micro-batch, supervised or not. All micro-batches of a step must be answered alike: where
            one has added its weight gradient to main_grad, Megatron no longer looks at what another returns.
    """
    return tokens > gpt.block_tokens(loss.logits_memory_budget_bytes) or gpt.softcap is not None


def block_tokens_of(loss: Loss, *models: GPT) -> int:
    """Tokens of a block in which the logits of all these models exist at one time."""
    return min(gpt.block_tokens(loss.logits_memory_budget_bytes // len(models)) for gpt in models)


def describe_head(gpt: GPT, teacher: GPT | None, tokens: int, loss: Loss) -> str:
    """How output layer and loss of a micro-batch will be run, and why. `teacher`: None without a live one."""
    if loss.targets == "whole":
        kept = teacher.config.hidden_size * teacher.config.params_dtype.itemsize
        return (
            f"both output layers and the loss fused, {min(tokens, block_tokens_of(loss, gpt, teacher)):,} tokens at a "
            f"time, since loss.targets is whole: the teacher's phase keeps {kept:,} bytes a token"
        )
    width, size = gpt.shard.stop - gpt.shard.start, gpt.config.params_dtype.itemsize
    need, budget = tokens * width * size, loss.logits_memory_budget_bytes
    seen = f"logits of up to {tokens:,} tokens take {need:,} bytes, loss.logits_memory_budget_bytes is {budget:,}"
    if not is_fused(gpt, tokens, loss):
        return f"output layer and loss apart: {seen}"
    why = "" if need > budget else " for the soft cap's sake"
    return f"output layer and loss fused{why}, {min(tokens, gpt.block_tokens(budget)):,} tokens at a time: {seen}"


def compare(sums: Tensor, id_T: Tensor, teacher_id_T: Tensor, label_logprob_T: Tensor) -> None:
    """Fill in what needs both models' predictions: top-1 agreement, and the teacher's CE by its labels' probability."""
    sums[SUMS.index("teacher_ce")] = -label_logprob_T.double().sum()
    sums[SUMS.index("agreement")] = (id_T == teacher_id_T).sum()
    sums[SUMS.index("measured_tokens")] = len(id_T)
