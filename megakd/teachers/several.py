"""Several live teachers, each for the samples of its own sources.

Legend: T supervised tokens of a micro-batch.
"""

import dataclasses

import torch
import torch.distributed as dist

from megakd.kernels.vocab import MASKED
from megakd.models.groups import is_last_stage
from megakd.models.micro_batch import MicroBatch
from megakd.models.output_layer import OutputLayer
from megakd.models.sharding import is_sharded
from megakd.teachers.mixed import MixedLesson, Part
from megakd.teachers.online import OnlineTeacher


class SeveralTeachers:
    """Live teachers one after the other, each over the micro-batches in which a sample is its own.

    A micro-batch with samples of several goes through each of them whole; their runs are put together so that few are
    (`assembly.setup`). What is not a teacher's own is not used.

    Args:
        teachers: of one kind of targets and one split of the vocabulary.
        names, weights: of each; weights are factors of the divergence.
        groups: the run's process groups.
    """

    def __init__(self, teachers: list[OnlineTeacher], names: list[str], weights: list[float], groups):
        self.teachers, self.names, self.weights, self.groups = teachers, names, weights, groups
        # Ranks that share experts or weights run them together.
        shared = any(is_sharded(teacher.gpt) or teacher.sharing is not None for teacher in teachers)
        self.in_step = groups.ep.size() > 1 or shared

    @property
    def heads(self) -> list[OutputLayer]:
        """Their output layers, on the last stage."""
        return [teacher.gpt for teacher in self.teachers]

    @property
    def temperature(self) -> float:
        return self.teachers[0].temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        for teacher in self.teachers:
            teacher.temperature = value

    def lessons(self, micro_batches: list[MicroBatch], step: int = 0) -> list[MixedLesson]:
        """As of a TeacherSource.

        Raises:
            TrainingError: as of an online teacher.
        Collectives: those of the teachers; where ranks run them together, one all-reduce of 8 bytes each.
        """
        parts: list[list[Part]] = [[] for _ in micro_batches]
        for number, (teacher, weight) in enumerate(zip(self.teachers, self.weights, strict=True)):
            mine = [place for place, micro_batch in enumerate(micro_batches) if number in taught_by(micro_batch)]
            asked = self.filled_up([micro_batches[place] for place in mine], micro_batches[0])
            if not asked:
                continue
            said = teacher.lessons(asked, step)
            for place, lesson in zip(mine, said[: len(mine)] if said else [], strict=bool(said)):
                rows_P = (micro_batches[place].teachers_T == number).nonzero()[:, 0]
                if len(taught_by(micro_batches[place])) > 1:
                    lesson = lesson.rows(rows_P)
                parts[place].append(Part(rows_P, lesson, number, weight))
        return [MixedLesson(tuple(of_one)) for of_one in parts] if is_last_stage(self.groups) else []

    def filled_up(self, micro_batches: list[MicroBatch], like: MicroBatch) -> list[MicroBatch]:
        """With as many empty ones behind them as the schedule, and ranks that run in step, need."""
        count = len(micro_batches)
        if self.in_step:
            most = torch.tensor(count, device=like.ids_BS.device)
            dist.all_reduce(most, dist.ReduceOp.MAX, group=self.groups.dp_cp)
            count = int(most)
        empty = dataclasses.replace(like, labels_BS=torch.full_like(like.labels_BS, MASKED))
        return micro_batches + [empty] * (count - len(micro_batches))


def taught_by(micro_batch: MicroBatch) -> set[int]:
    """The numbers of the teachers of a micro-batch; where nothing is supervised, the first stands for none."""
    return set(micro_batch.teachers) - {-1} or {0}
