"""What one rank computes in a step, caught on the way: batch, lessons, losses of every token, gradients.

Legend: B samples of a micro-batch, S sequence, T supervised tokens of it, K slots of a teacher's entries, P parameters.
"""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megakd.config import Parallel
from megakd.kernels import KDLoss
from megakd.kernels.vocab import MASKED
from megakd.models.initialization import is_split, shared_name
from megakd.models.micro_batch import MicroBatch
from megakd.steps.folder import IDS, SAMPLES, TARGETS, TOKENS, RankPart
from megakd.teachers.lesson import Lesson
from megakd.teachers.mixed import MixedLesson
from megakd.teachers.whole_lesson import WholeLesson
from megakd.training.fully_sharded import FullySharded, sharded_squares


class StepWitness:
    """Catches what one rank computes in a step; see megakd.steps.folder for what of it.

    Args:
        gpt: this rank's part of the student.
        groups: the run's process groups.
        micro_batches: this data-parallel rank's, in order.
        samples: (epoch, index) of the rows of each of them.
    """

    def __init__(self, gpt, groups, micro_batches: list[MicroBatch], samples: list[list]):
        self.gpt, self.groups, self.micro_batches, self.samples = gpt, groups, micro_batches, samples
        self.tokens: dict[int, dict[str, np.ndarray]] = {}
        self.squares: dict[tuple[str, bool], float] = {}

    def losses(self, micro_batch: MicroBatch, lesson: Lesson | WholeLesson | MixedLesson, losses: KDLoss) -> None:
        """Keep what the last stage knows of a micro-batch, in the order of samples and positions."""
        if not isinstance(lesson, Lesson):
            lesson = lesson.selected(micro_batch.labels_T)
        order_T, shard, targets = token_order(micro_batch), self.gpt.shard, lesson.targets
        columns = {"loss": losses.loss_T, "kd": losses.kd_T, "ce": losses.ce_T}
        columns |= {"label_logprob": lesson.label_logprob_T, "log_tail": targets.log_tail_T}
        arrays = {name: numpy_of(column_T[order_T]) for name, column_T in columns.items()}
        ids_TK, logprobs_TK = numpy_of(targets.ids_TK[order_T]), numpy_of(targets.logprobs_TK[order_T])
        own_TK = (ids_TK >= shard.start) & (ids_TK < shard.stop)  # a cached teacher gives every rank all entries
        by_id_TK = np.argsort(ids_TK, axis=1, kind="stable")
        ids_TK, logprobs_TK, own_TK = (np.take_along_axis(x, by_id_TK, 1) for x in (ids_TK, logprobs_TK, own_TK))
        arrays |= {"entries": own_TK.sum(1), "target_ids": ids_TK[own_TK], "target_logprobs": logprobs_TK[own_TK]}
        self.tokens[id(micro_batch)] = arrays

    def gradients(self, ddp: list[torch.nn.Module]) -> None:
        """Keep the sum of squares of this rank's part of every parameter's gradient."""
        found = [gradient_squares(chunk, self.groups) for chunk in ddp]
        self.squares = dict(sorted(pair for squares in found for pair in squares.items()))

    def part(self) -> RankPart:
        """Everything that was caught."""
        groups = self.groups
        rows = sum(len(rows) for rows in self.samples)
        parts, first = [], groups.dp.rank() * rows
        for micro_batch, where in zip(self.micro_batches, self.samples, strict=True):
            parts.append(describe_samples(micro_batch, where, first) | self.tokens.get(id(micro_batch), {}))
            first += len(where)
        kinds = SAMPLES | IDS | (TOKENS | TARGETS if self.tokens else {})
        arrays = {name: np.concatenate([p[name] for p in parts]).astype(kind) for name, kind in kinds.items()}
        arrays["squares"] = np.array(list(self.squares.values()), "f8")
        return RankPart(groups.tp.rank(), groups.pp.rank(), groups.dp.rank(), arrays, list(self.squares))


def unseen_axes(parallel: Parallel) -> str:
    """The axes in use whose ranks hold what a record does not tell apart: parts of sequences, experts."""
    return " and ".join(
        f"parallel.{axis} = {getattr(parallel, axis)}" for axis in ("cp", "ep") if getattr(parallel, axis) > 1
    )


def token_order(micro_batch: MicroBatch) -> Tensor:
    """For each supervised token, in the order of samples and positions, its number in rows_T."""
    batch, device = len(micro_batch.ids_BS), micro_batch.ids_BS.device
    rows = torch.cat([torch.arange(start, stop, device=device) * batch + b for b, start, stop in micro_batch.parts()])
    rows = rows[micro_batch.labels_BS.T.flatten()[rows] != MASKED]
    assert len(rows) == len(micro_batch.rows_T), "a supervised token outside of every sample"
    return torch.searchsorted(micro_batch.rows_T, rows)


def describe_samples(micro_batch: MicroBatch, where: list, first: int) -> dict[str, np.ndarray]:
    """Samples, ids and labels of a micro-batch whose first row is row `first` of the global batch."""
    ids_BS, labels_BS = numpy_of(micro_batch.ids_BS), numpy_of(micro_batch.labels_BS)
    length = ids_BS.size // len(where)  # of a row; packed rows lie one after the other
    columns: dict[str, list] = {name: [] for name in SAMPLES | IDS}
    parts_of = [0] * len(where)
    for b, start, stop in micro_batch.parts():
        row = b if len(ids_BS) > 1 else start // length
        epoch, index = where[row]
        values = (first + row, parts_of[row], epoch, index, stop - start)
        parts_of[row] += 1
        for name, value in zip(SAMPLES, values, strict=True):
            columns[name].append([value])
        columns["ids"].append(ids_BS[b, start:stop])
        columns["labels"].append(labels_BS[b, start:stop])
    return {name: np.concatenate(values) for name, values in columns.items()}


@torch.no_grad()
def gradient_squares(ddp: torch.nn.Module, groups) -> dict[tuple[str, bool], float]:
    """(layout-free name, whether it is split) of this rank's parameters to the sum of squares of its global gradient.

    With the distributed optimizer a data-parallel rank has the sums of its own range of Megatron's buffers alone.

    Collectives: one all-reduce of 8 bytes a parameter over the ranks that share it, with that optimizer or FSDP.
    """
    if isinstance(ddp, FullySharded):
        squares = sharded_squares(ddp)
        keys = {name: (shared_name(ddp.module, name), is_split(part)) for name, part in ddp.parts.items()}
        return dict(sorted((keys[name], square) for name, square in squares.items()))
    names = {parameter: shared_name(ddp.module, name) for name, parameter in ddp.module.named_parameters()}
    found = {}
    for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers):
        group, own = buffer.data_parallel_group, ddp.ddp_config.use_distributed_optimizer
        squares = []
        for parameter, (start, stop, bucket_id) in buffer.param_index_map.items():
            gradient, bucket = parameter.main_grad.flatten(), buffer.buckets[bucket_id]
            if own:
                size = bucket.grad_data.numel() // group.size()
                low = bucket.offset + group.rank() * size
                gradient = gradient[max(low - start, 0) : max(min(low + size, stop) - start, 0)]
            squares.append(torch.linalg.vector_norm(gradient, dtype=torch.float64).square())
        squares_P = torch.stack(squares)
        if own:
            dist.all_reduce(squares_P, group=group)
        keys = [(names[parameter], is_split(parameter)) for parameter in buffer.param_index_map]
        found |= dict(zip(keys, squares_P.tolist(), strict=True))
    return dict(sorted(found.items()))


def numpy_of(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
