"""What a recording works with, from a config: teacher, tokenizer, samples in order, what is kept of a token."""

import dataclasses
import math

import torch

from megakd import __version__
from megakd.assembly.architectures import check_padding, check_teacher, choose_tokenizer, read_both, with_vocab
from megakd.assembly.data import open_both
from megakd.assembly.models import build_model
from megakd.cache import Contents, Header
from megakd.cache.fingerprint import folder_fingerprint
from megakd.cache.row import row_bytes
from megakd.checkpoints.folder import Checkpoint
from megakd.config import Config, check_model, check_vocab
from megakd.errors import ConfigError
from megakd.models.gpt import GPT, padded_vocab_size
from megakd.models.groups import build_groups
from megakd.ranks import from_rank_0
from megakd.recording.reading_order import Samples
from megakd.teachers.entries import Recipe

SHARD_BYTES = 128 << 20


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
