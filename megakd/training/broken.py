"""A batch that breaks a run: what counts as one, and what is kept of it.

Legend: B samples, S sequence, T supervised tokens of a micro-batch.
"""

import json
import math
import pathlib
import statistics

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.errors import TrainingError
from megakd.kernels.vocab import MASKED
from megakd.models.forward_only import forward_only
from megakd.models.micro_batch import MicroBatch
from megakd.teachers.mixed import parts_of
from megakd.training.step import StudentStep

FOLDER = "broken"  # in the run folder
REMEMBERED = 64  # losses that the median is taken of
FEWEST = 8


def loss_limit(recent: list[float], factor: float | None) -> float:
    """The largest loss that is no spike, given those of the last steps; infinite while there are too few of them."""
    if factor is None or len(recent) < FEWEST:
        return math.inf
    return factor * statistics.median(recent)


def keep_evidence(
    run_dir: str, step: int, why: str, student: StudentStep, micro_batches: list[MicroBatch], samples: list[list]
) -> pathlib.Path:
    """Write every sample of this step's batch with the loss of each of its tokens; the weights are those before it.

    One file for each data-parallel rank, a line of JSON for each micro-batch: `samples` ([epoch, index] in the data
    set), `ids`, `labels` and `losses`, the last three [B][S]; a loss is null where nothing is supervised, and a text
    (`nan`, `inf`) where it is not finite.

    Args:
        samples: (epoch, index) of each micro-batch's samples.
    Returns:
        The folder.
    Raises:
        TrainingError: on every rank; it could not be written on one of them.
    Collectives: those of the models and the loss; one all-reduce of 4 bytes.
    """
    folder = pathlib.Path(run_dir) / FOLDER / f"step_{step:08d}"
    groups = student.groups
    losses = token_losses(student, micro_batches, step)
    failure = None
    if losses and groups.tp.rank() == 0 and groups.cp.rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f"rank_{groups.dp.rank():05d}.jsonl", "w", encoding="utf-8") as file:
                for micro_batch, where, loss_BS in zip(micro_batches, samples, losses, strict=True):
                    line = {"step": step, "why": why, "samples": where, "ids": micro_batch.ids_BS.tolist()}
                    losses_BS = plain(loss_BS, micro_batch.labels_BS)
                    line |= {"labels": micro_batch.labels_BS.tolist(), "losses": losses_BS}
                    file.write(json.dumps(line) + "\n")
        except OSError as error:
            failure = error
    failed = torch.tensor(int(failure is not None), dtype=torch.int32, device=micro_batches[0].ids_BS.device)
    dist.all_reduce(failed)
    if failed:
        raise TrainingError(f"{why}; and its samples could not be written to {folder}") from failure
    return folder


def token_losses(student: StudentStep, micro_batches: list[MicroBatch], step: int) -> list[Tensor]:
    """Loss [B, S] of each micro-batch, without dropout; empty on earlier pipeline stages."""
    loss = student.loss.at(step)
    lessons = iter(student.lessons(micro_batches, loss, step))

    def keep(hidden_SBH: Tensor, micro_batch: MicroBatch) -> Tensor:
        gpt, lesson, labels_T = student.gpt, next(lessons), micro_batch.labels_T
        loss_SB = torch.zeros(micro_batch.ids_BS.numel(), device=labels_T.device)
        for part in parts_of(lesson, labels_T):
            every = torch.arange(len(part.rows_P), device=labels_T.device)
            for block_B in every.split(gpt.block_tokens(loss.logits_memory_budget_bytes)):
                rows_B = part.rows_P[block_B]
                logits_BW = gpt.logits(hidden_SBH, micro_batch.rows_T[rows_B])
                given = logits_BW, labels_T[rows_B], gpt.shard, part.loss(loss)
                losses = part.lesson.rows(block_B).losses(*given)
                loss_SB[micro_batch.whole_rows_T[rows_B]] = losses.loss_T
        if student.groups.cp.size() > 1:
            dist.all_reduce(loss_SB, group=student.groups.cp)
        batch, length = micro_batch.ids_BS.shape
        return loss_SB.view(length, batch).T

    return forward_only(student.gpt, micro_batches, keep, student.groups)


def plain(loss_BS: Tensor, labels_BS: Tensor) -> list[list]:
    """As JSON can hold it."""
    return [
        [None if label == MASKED else x if math.isfinite(x) else str(x) for x, label in zip(*row, strict=True)]
        for row in zip(loss_BS.tolist(), labels_BS.tolist(), strict=True)
    ]
