"""Recording a teacher into a logit cache: from a config to the finished folder.

The samples stand in one order, validation data first, then training data as training reads it. They are cut into parts,
each of which becomes a shard; data-parallel ranks take turns at the parts that are missing.
"""

import contextlib
import dataclasses
import logging
import math
import pathlib
import time

import torch
import torch.distributed as dist

from megakd import __version__
from megakd.assembly.architectures import check_padding, check_teacher, choose_tokenizer, read_both, with_vocab
from megakd.assembly.data import open_both
from megakd.assembly.models import build_model
from megakd.cache import Contents, Header, finish, read_header, whole_head, writing
from megakd.cache.fingerprint import folder_fingerprint
from megakd.cache.row import row_bytes
from megakd.checkpoints.folder import Checkpoint
from megakd.config import Config, check_model, check_vocab
from megakd.data.dataset import batch_length, load_batch
from megakd.errors import CacheError, ConfigError, MegakdError
from megakd.models.gpt import GPT, padded_vocab_size
from megakd.models.groups import build_groups
from megakd.models.micro_batch import build_micro_batch
from megakd.models.sharding import is_sharded
from megakd.progress import progress_bar
from megakd.ranks import Ranks, from_rank_0
from megakd.recording.output_layer import record_output_layer
from megakd.recording.part_writer import PartWriter
from megakd.recording.reading_order import Samples
from megakd.recording.recorder import HiddenRecorder, Recorder
from megakd.stopped import clear_stopped, write_stopped
from megakd.teachers.entries import Recipe

LOG = logging.getLogger("megakd")
SHARD_BYTES = 128 << 20


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


@dataclasses.dataclass
class RecordingSetup:
    """What a recording works with.

    Attributes:
        config: the run's.
        device: of the teacher and batches.
        groups: process groups.
        teacher_from: the teacher's checkpoint.
        tokenizer_fingerprint: of data and teacher.
        vocab_size, padded_size: real ids that student and teacher share; columns that are there.
        samples: all that is to be recorded, in order.
        recipe, contents: what is kept of a token, and how.
    """

    config: Config
    device: torch.device
    groups: object
    teacher_from: Checkpoint
    tokenizer_fingerprint: str
    vocab_size: int
    padded_size: int
    samples: Samples
    recipe: Recipe
    contents: Contents

    def load_teacher(self) -> GPT:
        """This rank's part of the teacher, with weights."""
        config = self.config
        return build_model(
            self.teacher_from.model, self.teacher_from, config.parallel.of_teacher, config.teacher_train, self.groups,
            vocab_size=self.vocab_size, padded_size=self.padded_size, device=self.device,
            name="teacher", pipeline=config.teacher.pipeline, sharded=config.parallel.shards("teacher"),
        )  # fmt: skip

    @property
    def shard_samples(self) -> int:
        """Samples of one part; follows from the config alone, so that every launch cuts the same parts."""
        length = self.config.data.sequence_length
        expected_bytes = row_bytes(length, length * self.contents.top_k, self.contents)
        return self.config.cache.shard_samples or max(SHARD_BYTES // expected_bytes, 1)


def build_recording(config: Config, device: torch.device) -> RecordingSetup:
    """Read and check everything but the teacher's weights.

    Raises:
        ConfigError, CheckpointError, DataError: something is missing or does not fit together.
    """
    student_from, teacher_from = from_rank_0(lambda: read_both(config))
    tokenizer = choose_tokenizer(config, student_from)
    student = with_vocab(student_from.model if student_from else config.student.model, tokenizer, "the student")
    check_model(config, teacher_from.model, f"teacher {teacher_from.path}")
    check_teacher(config, teacher_from, tokenizer)
    check_vocab(config, tokenizer.vocab_size)
    padded_size = padded_vocab_size(teacher_from.model.vocab_size)
    check_padding(padded_size, config.parallel.tp)
    # One by one, never packed: a sample is recorded once, and found again in whatever pack it comes.
    data = config.data.model_copy(update={"packing": False})
    train_data, validation_data = open_both(config.model_copy(update={"data": data}), tokenizer)
    vocab_size = min(student.vocab_size, teacher_from.model.vocab_size)
    recipe = make_recipe(config, vocab_size)
    return RecordingSetup(
        config=config,
        device=device,
        groups=build_groups(
            config.parallel.tp, config.parallel.pp, config.run.seed, cp=config.parallel.cp, ep=config.parallel.ep
        ),
        teacher_from=teacher_from,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=vocab_size,
        padded_size=padded_size,
        samples=Samples(train_data, validation_data, config),
        recipe=recipe,
        contents=make_contents(recipe, config.cache.codec, vocab_size, teacher_from.model.hidden_size),
    )


def make_recipe(config: Config, vocab_size: int) -> Recipe:
    """What the cache section asks to keep; its open ends come from the loss section."""
    cache = config.cache
    if cache.mode == "hidden":
        return Recipe(cache.mode, 0, ())
    top_k = cache.top_k or config.loss.top_k
    if top_k > vocab_size:
        raise ConfigError(
            f"cache.top_k {top_k} exceeds the vocabulary of {vocab_size} ids", hint=f"at most {vocab_size}"
        )
    temperatures = tuple(cache.temperatures) or (config.loss.temperature,)
    return Recipe(cache.mode, top_k, temperatures, cache.top_p, cache.keep_label, cache.draws or 0)


def make_contents(recipe: Recipe, codec: str | None, vocab_size: int, hidden_size: int) -> Contents:
    """What the rows of a recipe hold; pure draws are counted, and a count fits 8 bits when their number does.

    Args:
        codec: of the cache section.
        vocab_size, hidden_size: of the teacher.
    """
    if recipe.mode == "hidden":
        return Contents(vocab_size, 0, (), codec or "bf16", hidden_size=hidden_size)
    codec = codec or "fp16"
    if recipe.mode == "sampled":
        codec = "count8" if recipe.draws < 256 else "count16"
        return Contents(vocab_size, recipe.slots, recipe.temperatures, codec, sampled=True, draws=recipe.draws)
    return Contents(vocab_size, recipe.slots, recipe.temperatures, codec, sampled=recipe.drawn)


def make_header(setup: RecordingSetup, command: str) -> Header:
    """The header of a recording that has not begun."""
    cache = setup.config.cache
    return Header(
        contents=setup.contents,
        mode=cache.mode,
        options={
            "top_p": cache.top_p,
            "keep_label": cache.keep_label,
            "draws": cache.draws,
            "precision": setup.config.teacher_train.precision,
        },
        tail="none" if setup.contents.sampled or setup.contents.hidden_size else "measured",
        tokenizer_fingerprint=setup.tokenizer_fingerprint,
        teacher_fingerprint=folder_fingerprint(setup.teacher_from.path),
        data=setup.samples.describe() | {"shard_samples": setup.shard_samples},
        parts=math.ceil(len(setup.samples) / setup.shard_samples),
        created={"command": command, "megakd_version": __version__},
    )


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
