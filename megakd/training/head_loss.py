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
from megakd.models.output_layer import OutputLayer
from megakd.teachers.lesson import Lesson, not_finite
from megakd.teachers.mixed import MixedLesson, parts_of
from megakd.teachers.whole_lesson import WholeLesson

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
        teachers: how many there are with names.
    """

    gpt: GPT
    micro_batch: MicroBatch
    lesson: Lesson | WholeLesson | MixedLesson
    loss: Loss
    tokens: int
    compared: bool
    keep: Callable[[KDLoss], None] | None
    teachers: int = 0

    def __call__(self, hidden_SBH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Summed loss, number of tokens, sums to report: [1 + teachers, len(SUMS)], of all and of each with a name."""
        labels_T, kept = self.micro_batch.labels_T, []
        parts = parts_of(self.lesson, labels_T)
        fused = is_fused(self.gpt, self.tokens, self.loss) or isinstance(parts[0].lesson, WholeLesson)
        hidden_TH = self.gpt.head_input(hidden_SBH, self.micro_batch.rows_T, whole_gradient=fused)
        loss_sum = 0
        sums = torch.zeros(1 + self.teachers, len(SUMS), dtype=torch.float64, device=labels_T.device)
        for part in parts:
            given = hidden_TH, labels_T
            if len(parts) > 1:
                given = hidden_TH.index_select(0, part.rows_P), labels_T[part.rows_P]
            compute = self.whole if isinstance(part.lesson, WholeLesson) else self.fused if fused else self.apart
            part_sum, own = compute(*given, part.lesson, part.loss(self.loss), kept.append if self.keep else None)
            loss_sum = loss_sum + part_sum
            for row in part.counted:
                sums[row] += own
        if self.keep:
            order_T = torch.cat([part.rows_P for part in parts]).argsort()
            self.keep(KDLoss(*(torch.cat(columns)[order_T] for columns in zip(*kept, strict=True))))
        return loss_sum, torch.tensor(len(labels_T), dtype=torch.int), sums

    def apart(self, hidden_TH: Tensor, labels_T: Tensor, lesson: Lesson, loss: Loss, keep) -> tuple[Tensor, Tensor]:
        """The output layer, then the loss."""
        gpt = self.gpt
        logits_TW = gpt.logits_of(hidden_TH)
        given = logits_TW, lesson.targets, labels_T, gpt.shard, loss
        loss_sum, sums = objective(*given, inplace_backward=True, keep=keep)
        if self.compared:
            said = predict(logits_TW.detach(), labels_T, gpt.shard)
            compare(sums, said.id_T, lesson.id_T, lesson.label_logprob_T)
        return loss_sum, sums

    def fused(self, hidden_TH: Tensor, labels_T: Tensor, lesson: Lesson, loss: Loss, keep) -> tuple[Tensor, Tensor]:
        """Both in blocks of tokens."""
        gpt = self.gpt
        ids: list[Tensor] = []

        def predict_rows(rows: Rows, logits_BW: Tensor) -> None:
            ids.append(predict(logits_BW, labels_T[rows], gpt.shard).id_T)

        loss_sum, sums = fused_objective(
            hidden_TH,
            gpt.head_weight,
            lesson.targets,
            labels_T,
            gpt.shard,
            loss,
            softcap=gpt.softcap,
            block_tokens=gpt.block_tokens(loss.logits_memory_budget_bytes),
            on_logits=predict_rows if self.compared else None,
            keep=keep,
        )
        if ids:
            compare(sums, torch.cat(ids), lesson.id_T, lesson.label_logprob_T)
        return loss_sum, sums

    def whole(
        self, hidden_TH: Tensor, labels_T: Tensor, lesson: WholeLesson, loss: Loss, keep
    ) -> tuple[Tensor, Tensor]:
        """Both models' output layers and the loss, in blocks of tokens.

        Raises:
            TrainingError: the teacher's logits are not finite; on every rank of the model.
        """
        gpt, head = self.gpt, lesson.head
        said: list[tuple[Tensor, Tensor, Tensor]] = []

        def predict_rows(rows: Rows, student_BW: Tensor, teacher_BW: Tensor) -> None:
            ours, theirs = (predict(x_BW, labels_T[rows], gpt.shard) for x_BW in (student_BW, teacher_BW))
            said.append((ours.id_T, theirs.id_T, theirs.label_logprob_T))

        try:
            loss_sum, sums = whole_objective(
                hidden_TH,
                gpt.head_weight,
                lesson.hidden_TH,
                head.head_weight,
                labels_T,
                gpt.shard,
                loss,
                softcaps=(gpt.softcap, head.softcap),
                block_tokens=block_tokens_of(loss, gpt, head),
                on_logits=predict_rows if self.compared else None,
                keep=keep,
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


def block_tokens_of(loss: Loss, *heads: OutputLayer) -> int:
    """Tokens of a block in which the logits of all these output layers exist at one time."""
    return min(head.block_tokens(loss.logits_memory_budget_bytes // len(heads)) for head in heads)


def describe_head(gpt: GPT, teachers: list[OutputLayer], tokens: int, loss: Loss) -> str:
    """How output layer and loss of a micro-batch will be run, and why. `teachers`: what is known whole of them."""
    if loss.targets == "whole":
        kept = max(head.state_bytes for head in teachers)
        block = min(block_tokens_of(loss, gpt, head) for head in teachers)
        shared = ", shared out over the ranks of tp" if gpt.shard.ranks > 1 else ""
        return (
            f"both output layers and the loss fused, {min(tokens, block):,} tokens at a time, since loss.targets is "
            f"whole: the teacher's phase keeps {kept:,} bytes a token{shared}"
        )
    width, size = gpt.shard.stop - gpt.shard.start, gpt.logit_bytes
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
