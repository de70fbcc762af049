"""Recording a teacher into a logit cache: from a config to the finished folder.

The samples stand in one order, validation data first, then training data as training reads it. They are cut into parts,
each of which becomes a shard; data-parallel ranks take turns at the parts that are missing.
"""

import contextlib
import logging
import math
import pathlib
import time

import torch
import torch.distributed as dist

from megakd.cache import Header, finish, read_header, whole_head, writing
from megakd.config import Config
from megakd.data.dataset import batch_length, load_batch
from megakd.errors import CacheError, ConfigError, MegakdError
from megakd.models.micro_batch import build_micro_batch
from megakd.models.sharding import is_sharded
from megakd.progress import progress_bar
from megakd.ranks import Ranks, from_rank_0
from megakd.recording.output_layer import record_output_layer
from megakd.recording.part_writer import PartWriter
from megakd.recording.recorder import HiddenRecorder, Recorder
from megakd.recording.setup import RecordingSetup, build_recording, make_header
from megakd.stopped import clear_stopped, write_stopped

LOG = logging.getLogger("megakd")


def record(config: Config, ranks: Ranks, command: str) -> None:
    """Record what is missing of a cache, until it is finished or a stop signal comes.

    Args:
        config: with teacher.checkpoint and teacher.cache.
        ranks: the process group's environment: device, and whether a stop was asked for.
        command: what was typed, for the header.
    Raises:
        MegakdError: on every rank, with what to change.
    """
    if config.teacher is None or config.teacher.checkpoint is None or config.teacher.cache is None:
        raise ConfigError(
            "teacher.checkpoint and teacher.cache are both needed to record: who speaks, and where it is kept",
            hint="megakd cache CONFIG.yaml teacher.checkpoint=RUN_FOLDER teacher.cache=CACHE_FOLDER",
        )
    if isinstance(config.teacher.cache, list):
        raise ConfigError(
            f"teacher.cache is {config.teacher.cache}, but a teacher is recorded into one folder",
            hint="record each of them with a run of its own: `teacher.checkpoint=TEACHER teacher.cache=FOLDER`",
        )
    if config.parallel.cp > 1:
        raise ConfigError(
            f"parallel.cp is {config.parallel.cp}, but the rows of a recording are whole sequences",
            hint="record with parallel.cp=1, such as with those ranks as parallel.tp and parallel.sp=true; what is "
            "recorded so is read at every cp",
        )
    setup = build_recording(config, ranks.device)
    folder, header = pathlib.Path(config.teacher.cache), make_header(setup, command)
    with writing_together(folder, header) as whole:
        if dist.get_rank() == 0:
            clear_stopped(folder)
        ranks.on_early_stop(lambda: write_stopped(folder, finished=False))
        LOG.info("recording samples %d to %d into %s", setup.samples.start, setup.samples.end, folder)
        missing = [part for part in range(header.parts) if part not in whole]
        headless = header.contents.hidden_size > 0 and from_rank_0(lambda: whole_head(folder, header) is None)
        done = True
        if missing or headless:
            recording = Recording(setup, header, folder, ranks)
            if headless:
                record_output_layer(folder, header, recording.recorder, setup.groups)
            done = recording.run(missing)
        dist.barrier()
        if dist.get_rank() == 0:
            if not read_header(folder).finished and done:
                finish(folder, header)
            elif not done:
                write_stopped(folder, finished=False)
                LOG.info("asked to stop: start the same `megakd cache` again, it goes on after the last whole shard")
        dist.barrier()
    if done:
        header = read_header(folder)
        LOG.info("%s: %d samples, %d tokens, finished", folder, header.rows, header.tokens)


@contextlib.contextmanager
def writing_together(folder: pathlib.Path, header: Header):
    """`megakd.cache.writing` on rank 0; every rank gets what it yields, or its error.

    Collectives: one broadcast.
    """
    with contextlib.ExitStack() as stack:
        result = [None]
        if dist.get_rank() == 0:
            try:
                result = [stack.enter_context(writing(folder, header))]
            except MegakdError as error:
                result = [error]
        dist.broadcast_object_list(result)
        if isinstance(result[0], MegakdError):
            raise result[0]
        yield result[0]


class Recording:
    """One launch of a recording.

    Args:
        header: of the cache.
        folder: of the cache, owned by rank 0.
    """

    def __init__(self, setup: RecordingSetup, header: Header, folder: pathlib.Path, ranks: Ranks):
        self.setup, self.header, self.folder, self.ranks = setup, header, folder, ranks
        kind = HiddenRecorder if setup.contents.hidden_size else Recorder
        self.recorder = kind(setup.load_teacher(), setup.recipe, setup.groups, setup.config.run.seed)
        train = setup.config.train
        in_flight = 1 if setup.groups.pp.size() == 1 else 4 * setup.groups.pp.size()
        self.group_samples = in_flight * train.micro_batch_size
        # Ranks that share experts or weights run them together.
        self.in_step = setup.groups.ep.size() > 1 or is_sharded(self.recorder.gpt)
        self.tokens, self.started = 0, time.perf_counter()

    def run(self, missing: list[int]) -> bool:
        """Record parts; True when all of them are done, False after a stop signal.

        Every rank runs the same number of rounds, so that all of them leave together.
        """
        dp, size = self.setup.groups.dp, self.setup.shard_samples
        mine = missing[dp.rank() :: dp.size()]
        with (
            PartWriter(self.folder, self.setup.contents, enabled=self.recorder.writes) as writer,
            self.bar(mine) as bar,
        ):
            for turn in range(math.ceil(len(missing) / dp.size())):
                part = mine[turn] if turn < len(mine) else None
                numbers = range(0) if part is None else self.part_samples(part)
                for first in range(0, size, self.group_samples):
                    if self.ranks.agree_to_stop():
                        return False
                    self.ranks.pulse.mark("record", turn)
                    group = numbers[first : first + self.group_samples]
                    if group or self.in_step:
                        self.record_group(group, writer, bar)
                if part is not None:
                    writer.publish(part)
        return True

    def part_samples(self, part: int) -> range:
        size = self.setup.shard_samples
        return range(part * size, min((part + 1) * size, len(self.setup.samples)))

    def record_group(self, numbers: range, writer: PartWriter, bar) -> None:
        """Some samples through the teacher and on to the writer; the last micro-batch is filled up with empty rows.

        Collectives: those of the model; where ranks share experts or weights, one all-reduce of 8 bytes.
        """
        parallel, size = self.setup.config.parallel, self.setup.config.train.micro_batch_size
        samples, micro_batches = self.setup.samples, []
        length = batch_length(samples, [(0, number) for number in numbers], parallel.sequence_multiple)
        if self.in_step:
            longest = torch.tensor(length, device=self.setup.device)
            dist.all_reduce(longest, dist.ReduceOp.MAX)
            length = int(longest)
        for first in range(0, self.group_samples if self.in_step else len(numbers), size):
            batch = numbers[first : first + size]
            places = [(0, number) for number in batch] + [None] * (size - len(batch))
            loaded = load_batch(samples, places, length)
            micro_batches.append(build_micro_batch(loaded, packed=False).to(self.setup.device))
        try:
            rows = self.recorder.rows(micro_batches)
        except ValueError as error:  # of the kernels, on all ranks of this model alike
            raise CacheError(
                f"samples {numbers.start} to {numbers.stop - 1} of the recording: {error}",
                hint="look at the teacher's weights and at train.precision; parts recorded before stay as they are",
            ) from error
        writer.add(rows)
        if not bar.disable:
            self.tokens += sum(row.tokens for row in rows)
            rate = self.tokens * self.setup.groups.dp.size() / (time.perf_counter() - self.started)
            bar.set_postfix_str(f"{rate:,.0f} tok/s, {writer.bytes_per_token:.1f} B/tok", refresh=False)
            bar.update(len(numbers))

    def bar(self, mine: list[int]):
        """Progress of the first data-parallel rank, which stands for all."""
        shown = self.recorder.writes and self.setup.groups.dp.rank() == 0 and self.setup.config.log.progress
        total = sum(len(self.part_samples(part)) for part in mine)
        return progress_bar(total, "recording", shown=shown)
