"""A teacher that has spoken before: lessons from the logit cache, for any layout, order and batch size.

Legend: B samples of a micro-batch, S ids of a sample, T supervised tokens of the micro-batch, K slots.
"""

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from megakd.cache import CacheReader, Header, Table
from megakd.cache.samples import Sample, read_sample
from megakd.errors import CacheError
from megakd.kernels.vocab import MASKED
from megakd.models.groups import is_last_stage
from megakd.models.micro_batch import MicroBatch
from megakd.targets import TeacherTargets
from megakd.teachers.lesson import Lesson

STEPS_AHEAD = 2  # this one and the next
THREADS = 4  # decoding is numpy and checksums, which leave the interpreter free


class CachedTeacher:
    """Gives lessons from a cache; loss and loop cannot tell it from a live teacher.

    Args:
        readers: opened for the run's temperature and top_k, at least one; a sample is taken from the one that has it.
        groups: the run's process groups; stages before the last read nothing.
        data: what this run reads, in the terms of the header's `data`; a miss names what differs.
    """

    def __init__(self, readers: list[CacheReader], groups, data: dict):
        self.readers, self.groups, self.data = readers, groups, data
        self.pool = ThreadPoolExecutor(THREADS, "megakd-cache")
        self.ahead: dict[int, tuple[list[MicroBatch], list[Future]]] = {}

    def prefetch(self, micro_batches: list[MicroBatch]) -> None:
        """Start reading what the next `lessons` of these very micro-batches will return."""
        if is_last_stage(self.groups):
            futures = [self.pool.submit(self.lesson, micro_batch) for micro_batch in micro_batches]
            self.ahead[id(micro_batches)] = (micro_batches, futures)
            while len(self.ahead) > STEPS_AHEAD:
                del self.ahead[next(iter(self.ahead))]  # of a step that was left out

    def lessons(self, micro_batches: list[MicroBatch], step: int = 0) -> list[Lesson]:
        """As `TeacherSource`; every rank of the last stage has all entries of its rows.

        Raises:
            CacheError: a sample was not recorded, or in two caches; or its row is damaged.
        """
        if not is_last_stage(self.groups):
            return []
        if id(micro_batches) not in self.ahead:
            self.prefetch(micro_batches)
        _, futures = self.ahead.pop(id(micro_batches))
        device = micro_batches[0].ids_BS.device
        return [self.to_device(future.result(), device) for future in futures]

    def lesson(self, micro_batch: MicroBatch) -> Lesson:
        """One micro-batch's, on the host."""
        ids_BS, labels_BS = micro_batch.ids_BS.cpu().numpy(), micro_batch.labels_BS.cpu().numpy()
        batch, places, found = len(ids_BS), [np.empty(0, np.int64)], []
        for b, start, stop in micro_batch.parts():
            ids_S, labels_S = ids_BS[b, start:stop], labels_BS[b, start:stop]
            if (labels_S == MASKED).all():  # what fills up a batch, without a single id, too
                continue
            sample = read_sample(ids_S, labels_S)
            found.append(self.table(sample, ids_S))
            places.append((start + np.flatnonzero(sample.mask_S)) * batch + b)
        place_T = np.concatenate(places)
        order_T = np.argsort(place_T)
        if micro_batch.own_S is not None:
            order_T = order_T[np.isin(place_T[order_T], micro_batch.whole_rows_T.cpu().numpy())]
        return self.build(found, order_T)

    def build(self, found: list[tuple[CacheReader, Table]], order_T: np.ndarray) -> Lesson:
        """Tables of several samples as one lesson, on the host; `order_T` as of `build_lesson`."""
        tables = [table for _, table in found] or [empty_table(self.readers[0].header.contents.sampled)]
        return build_lesson(tables, order_T, self.readers[0].temperature)

    def to_device(self, lesson: Lesson, device) -> Lesson:
        return Lesson(lesson.targets.to(device), lesson.label_logprob_T.to(device), lesson.id_T.to(device))

    def table(self, sample: Sample, ids_S: np.ndarray) -> tuple[CacheReader, Table]:
        """The sample's row and whose it is, or an error that says why it may be missing."""
        found = [(reader, table) for reader in self.readers if (table := reader.table(*sample)) is not None]
        if len(found) == 1:
            return found[0]
        asked = f"the sample that begins with ids {ids_S[:6].tolist()}"
        if found:
            raise CacheError(
                f"{' and '.join(str(reader.folder) for reader, _ in found)} both hold {asked}: which teacher is right?",
                hint="leave one of them out of teacher.cache, or record them of data that do not overlap",
            )
        raise CacheError(
            "\n".join(
                f"{reader.folder} does not hold {asked} ({len(reader):,} samples are there): "
                f"{why_missing(reader.header, self.data)}"
                for reader in self.readers
            ),
            hint="record what this run reads: `megakd cache` with this config, then `megakd cache merge` if you "
            "want to keep the old samples too",
        )


def why_missing(header: Header, data: dict) -> str:
    """What the header knows of why a sample of this run is not in a cache.

    Args:
        data: what this run reads, in the terms of the header's `data`.
    """
    recordings, differing = header.recordings(), []
    for name, value in data.items():
        recorded = [recording[name] for recording in recordings if name in recording]
        if recorded and value not in recorded:
            seen = " and ".join(str(other) for other in dict.fromkeys(recorded))
            differing.append(f"{name} {seen} was recorded, this run has {value}")
    if differing:
        return "; ".join(differing)
    if any("imported" in recording for recording in recordings):
        return (
            "imported samples are found whole, as they stand in the token file that the import wrote: data.train must "
            "be that file, and data.sequence_length not below its longest sample"
        )
    return (
        "data, sequence length and seed are those of the recording, which covers other samples of them "
        "(train.steps, eval.samples, cache.start, cache.end, cache.share)"
    )


def build_lesson(tables: list[Table], order_T: np.ndarray, temperature: float) -> Lesson:
    """Tables of several samples as one lesson.

    Args:
        order_T: for each row of the lesson, its place in the tables one after the other.
    """
    slots = max(table.ids_TK.shape[1] for table in tables)

    def join(columns, fill=None):
        if fill is not None:
            columns = [np.pad(c, ((0, 0), (0, slots - c.shape[1])), constant_values=fill) for c in columns]
        return torch.from_numpy(np.concatenate(columns)[order_T])

    entropy_T = None if tables[0].entropy_T is None else join([table.entropy_T for table in tables])
    targets = TeacherTargets(
        join([table.ids_TK for table in tables], -1),
        join([table.logprobs_TK for table in tables], -np.inf),
        join([table.log_tail_T for table in tables]),
        temperature,
        entropy_T,
    )
    label_logprob_T = join([table.label_logprob_T for table in tables])
    return Lesson(targets, label_logprob_T, join([table.top_id_T for table in tables]))


def empty_table(sampled: bool) -> Table:
    """No tokens."""
    none_T = np.empty(0, np.float32)
    ids_TK, logprobs_TK = np.empty((0, 1), np.int64), np.empty((0, 1), np.float32)
    return Table(ids_TK, logprobs_TK, none_T, none_T, np.empty(0, np.int64), none_T if sampled else None)
