"""A teacher whose hidden states were recorded: its whole distribution, from disk, as if it ran.

Legend: T supervised tokens of a micro-batch, H hidden, W vocabulary columns of this rank, N rows of tables.
"""

import copy
import dataclasses

import numpy as np
import torch
from torch import Tensor

from megakd.cache import CacheReader, HiddenTable, read_head
from megakd.config import Loss
from megakd.kernels import VocabShard
from megakd.models.groups import is_last_stage
from megakd.models.micro_batch import MicroBatch
from megakd.models.output_layer import OutputLayer
from megakd.teachers.cached import CachedTeacher
from megakd.teachers.lesson import Lesson
from megakd.teachers.mixed import MixedLesson, Part
from megakd.teachers.sampled import draw_lesson
from megakd.teachers.whole_lesson import Spread, WholeLesson


class RecordedHead(OutputLayer):
    """A recorded output layer, this rank's columns of it; those that fill the vocabulary up are 0, and never read.

    Raises:
        CacheError: the file is missing or damaged.
    """

    def __init__(self, reader: CacheReader, shard: VocabShard, device: torch.device):
        record = reader.header.head
        assert shard.size == record.rows, f"{shard} and an output layer of {record.rows} ids"
        known_WH = read_head(reader.folder, record, shard.start, shard.start + shard.real_width)
        self.head_weight = torch.zeros(
            (shard.stop - shard.start, record.hidden_size), dtype=known_WH.dtype, device=device
        )
        self.head_weight[: len(known_WH)] = known_WH.to(device)
        self.shard, self.softcap = shard, record.softcap


class RecordedTeacher(CachedTeacher):
    """Gives what a live teacher would, of recorded hidden states, at any temperature.

    Caches with one output layer are one teacher; a sample of another cache is compared with that one's.

    Args:
        readers, groups, data: as of a cached teacher; all hold hidden states.
        shard: of the student.
        loss: what is compared: the whole, entries or draws.
        seed: of the run, for draws.
        device: of the student.
    """

    def __init__(
        self, readers: list[CacheReader], groups, data: dict, *, shard: VocabShard, loss: Loss, seed: int, device
    ):
        super().__init__(readers, groups, data)
        self.targets, self.top_k, self.temperature = loss.targets, loss.top_k, loss.temperature
        self.draws, self.seed, self.budget_bytes = loss.draws, seed, loss.logits_memory_budget_bytes
        contents = [(reader.header.head.chunks, reader.header.head.softcap) for reader in readers]
        different = list(dict.fromkeys(contents))
        self.head_of = {id(reader): different.index(content) for reader, content in zip(readers, contents, strict=True)}
        self.heads: list[OutputLayer] = []
        if is_last_stage(groups):
            self.heads = [RecordedHead(readers[contents.index(head)], shard, device) for head in different]

    def whole(self) -> "RecordedTeacher":
        """The same teacher, giving whole distributions."""
        teacher = copy.copy(self)
        teacher.targets, teacher.draws, teacher.ahead = "whole", None, {}
        return teacher

    def lessons(self, micro_batches: list[MicroBatch], step: int = 0) -> list[Lesson | WholeLesson | MixedLesson]:
        """As of a cached teacher.

        Collectives: those of choosing entries, or of drawing, from the logits; none of whole distributions.
        """
        lessons = super().lessons(micro_batches, step)
        if self.targets == "whole" or not lessons:
            return lessons
        pairs = zip(lessons, micro_batches, strict=True)
        if self.targets == "top_k":
            return [lesson.selected(micro_batch.labels_T) for lesson, micro_batch in pairs]
        block = min(head.block_tokens(self.budget_bytes) for head in self.heads)
        how = self.draws, self.seed, step, self.temperature, block
        return [draw_lesson(*pair, *how) for pair in pairs]

    def build(self, found: list[tuple[CacheReader, HiddenTable]], order_T: np.ndarray) -> WholeLesson | MixedLesson:
        """Tables of several samples as one lesson, on the host."""
        sizes = [len(table.hidden_TH) for _, table in found]
        head_N = np.repeat([self.head_of[id(reader)] for reader, _ in found], sizes)
        parts = []
        for number, head in enumerate(self.heads):
            mine_T = np.flatnonzero(head_N[order_T] == number)
            if len(mine_T):
                states = [table.hidden_TH for reader, table in found if self.head_of[id(reader)] == number]
                place_P = np.searchsorted(np.flatnonzero(head_N == number), order_T[mine_T])
                hidden_PH = torch.cat(states)[torch.from_numpy(place_P)]
                parts.append(Part(torch.from_numpy(mine_T), self.about(hidden_PH, head)))
        if not parts:
            head = self.heads[0]
            return self.about(torch.empty(0, head.head_weight.shape[1]), head)
        return parts[0].lesson if len(parts) == 1 else MixedLesson(tuple(parts))

    def about(self, hidden_TH: Tensor, head: OutputLayer) -> WholeLesson:
        hidden_TH = hidden_TH.to(head.head_weight.dtype)
        return WholeLesson(hidden_TH, head, self.top_k, self.temperature, self.budget_bytes)

    def to_device(self, lesson: WholeLesson | MixedLesson, device) -> WholeLesson | MixedLesson:
        if isinstance(lesson, MixedLesson):
            parts = (Part(part.rows_P.to(device), self.to_device(part.lesson, device)) for part in lesson.parts)
            return MixedLesson(tuple(parts))
        hidden_TH = lesson.hidden_TH
        if self.targets == "whole":
            hidden_TH = Spread.of(hidden_TH, lesson.head.shard)
        # Read ahead of a temperature's ramp, it is told the one of now.
        return dataclasses.replace(lesson, hidden_TH=hidden_TH.to(device), temperature=self.temperature)
