"""From a config to live objects: tokenizer, architectures that fit each other, models with weights, data."""

import dataclasses
import logging
import math

import torch
import torch.distributed as dist

from megakd.checkpoints.folder import Checkpoint, read_checkpoint
from megakd.checkpoints.torch_dist import load_weights
from megakd.config import Config, Loss, Model, check_features, check_model, check_vocab
from megakd.data.dataset import batch_length, load_batch
from megakd.data.order import batch_indices, split_batch, validation_indices
from megakd.data.sources import open_data
from megakd.data.tokenizers import load_tokenizer
from megakd.errors import CheckpointError, ConfigError, TrainingError
from megakd.models.cached_teacher import CachedTeacher
from megakd.models.features import FeatureLoss
from megakd.models.gpt import GPT, build_gpt, padded_vocab_size
from megakd.models.groups import build_groups
from megakd.models.micro_batch import MicroBatch, build_micro_batch
from megakd.models.teacher import OnlineTeacher, TeacherSource
from megakd.training.cached import describe_data, open_cache
from megakd.training.run_folder import from_rank_0

LOG = logging.getLogger("megakd")
CE_ONLY = Loss(kd_weight=0.0, ce_weight=1.0)


@dataclasses.dataclass
class Setup:
    """What a run works with.

    Attributes:
        config: the run's.
        device: of models and batches.
        groups: process groups.
        tokenizer: of the data and both models.
        model: the student's section with its real vocabulary filled in.
        teacher_model: the section of a teacher that runs, None without one.
        student: this rank's part of the student, with weights.
        teacher: None for plain training.
        features: distances between hidden states, attached to the student; None without a features section.
        loss: the loss section that applies: CE alone without a teacher.
        train_data, validation_data: data sets as `megakd.data.sources.open_data` returns; validation may be None.
        ahead: the next step's micro-batches, for a teacher that reads what it says while the student computes.
    """

    config: Config
    device: torch.device
    groups: object
    tokenizer: object
    model: Model
    teacher_model: Model | None
    student: GPT
    teacher: TeacherSource | None
    features: FeatureLoss | None
    loss: Loss
    train_data: object
    validation_data: object | None
    ahead: dict[int, list[MicroBatch]] = dataclasses.field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        train = self.config.train
        return train.steps or max(math.ceil(train.epochs * len(self.train_data) / train.global_batch_size), 1)

    def batch(self, step: int) -> list[MicroBatch]:
        """This data-parallel rank's micro-batches of a step; the first step is 0."""
        train, seed = self.config.train, self.config.run.seed

        def load(step: int) -> list[MicroBatch]:
            indices = batch_indices(seed, step, train.global_batch_size, len(self.train_data))
            return self._load(self.train_data, indices, packed=self.config.data.packing)

        micro_batches = self.ahead.pop(step, None) or load(step)
        if isinstance(self.teacher, CachedTeacher) and step + 1 < self.steps:
            self.ahead = {step + 1: load(step + 1)}
            self.teacher.prefetch(self.ahead[step + 1])
        return micro_batches

    def validation_batches(self):
        """This rank's micro-batches of the validation set, batch by batch."""
        size, data = self.config.train.global_batch_size, self.validation_data
        samples = min(self.config.eval.samples or len(data), len(data))
        for step in range(math.ceil(samples / size)):
            yield self._load(data, validation_indices(step, size, samples), packed=False)

    def _load(self, data, indices: list, *, packed: bool) -> list[MicroBatch]:
        dp, parallel = self.groups.dp, self.config.parallel
        length = batch_length(data, indices, parallel.tp if parallel.sp else 1)
        parts = split_batch(indices, dp.rank(), dp.size(), self.config.train.micro_batch_size)
        return [build_micro_batch(load_batch(data, part, length), packed=packed).to(self.device) for part in parts]


def build_setup(config: Config, device: torch.device) -> Setup:
    """Read, check and build everything but the optimizer, cheapest checks first.

    Raises:
        ConfigError, CheckpointError, DataError: something is missing or does not fit together; before any weight
            is read.
    """
    student_from, teacher_from = from_rank_0(lambda: read_both(config))
    tokenizer = choose_tokenizer(config, student_from)
    model = with_vocab(student_from.model if student_from else config.student.model, tokenizer, "the student")
    check_model(config, model, "the student", trained=True)
    check_vocab(config, tokenizer.vocab_size)
    vocab_size, padded_size = model.vocab_size, padded_vocab_size(model.vocab_size)
    cache = open_cache(config, tokenizer, model, teacher_from) if config.teacher and config.teacher.cache else None
    if cache:
        vocab_size, teacher_from = cache.header.contents.vocab_size, None  # it need not run
    if teacher_from:
        check_teacher(config, teacher_from, tokenizer)
        check_features(config, model, teacher_from.model)
        vocab_size = min(vocab_size, teacher_from.model.vocab_size)
        padded_size = max(padded_size, padded_vocab_size(teacher_from.model.vocab_size))
    check_padding(padded_size, config.parallel.tp)
    train_data, validation_data = open_both(config, tokenizer)
    groups = build_groups(config.parallel.tp, config.parallel.pp, config.run.seed)

    def build(section: Model, seed: int | None) -> GPT:
        gpt = build_gpt(
            section, config.parallel, config.train, groups,
            vocab_size=vocab_size, padded_size=padded_size, device=device, seed=seed,
        )  # fmt: skip
        return gpt

    student = build(model, None if student_from else config.run.seed)
    if student_from:
        load_weights(student, student_from, groups)
    teacher, features, loss = None, None, config.loss if config.teacher else CE_ONLY
    if cache:
        teacher = CachedTeacher(cache, groups, describe_data(config, train_data, validation_data))
    elif teacher_from:
        gpt = build(teacher_from.model, None)
        load_weights(gpt, teacher_from, groups)
        teacher = OnlineTeacher(
            gpt,
            top_k=loss.top_k,
            temperature=loss.temperature,
            groups=groups,
            budget_bytes=loss.logits_memory_budget_bytes,
        )
        if config.features:
            features = FeatureLoss(student, gpt, config.features, config.run.seed)
    return Setup(
        config, device, groups, tokenizer, model, teacher_from.model if teacher_from else None,
        student, teacher, features, loss, train_data, validation_data,
    )  # fmt: skip


def open_both(config: Config, tokenizer) -> tuple:
    """Training and validation data (None without); what is not tokenized yet is, by rank 0 while the others wait.

    Collectives: one broadcast; `run.timeout_seconds` must be enough for rank 0 (or use `megakd prepare` before).
    """

    def open_all(build: bool) -> tuple:
        sources = ((config.data.train, config.run.seed), (config.data.validation, None))
        return tuple(
            None if source is None else open_data(config.data, source, tokenizer, seed, build=build, progress=shown)
            for source, seed in sources
        )

    shown = config.log.progress and dist.get_rank() == 0
    from_rank_0(lambda: open_all(build=True) and None)
    return open_all(build=False)


def read_both(config: Config) -> tuple[Checkpoint | None, Checkpoint | None]:
    """What student and teacher start from; of a run folder, its last checkpoint at this moment."""
    paths = (config.student.checkpoint, config.teacher.checkpoint if config.teacher else None)
    return tuple(read_checkpoint(path) if path else None for path in paths)


def choose_tokenizer(config: Config, student_from: Checkpoint | None):
    path = config.data.tokenizer or (student_from.tokenizer_path if student_from else None)
    if path is None:
        raise ConfigError(
            f"no tokenizer: data.tokenizer is null and {student_from.path} carries none",
            hint="set data.tokenizer to the tokenizer file the data was prepared with",
        )
    tokenizer = load_tokenizer(path)
    if student_from and student_from.tokenizer_fingerprint not in (None, tokenizer.fingerprint):
        raise ConfigError(
            f"data.tokenizer {path} ({tokenizer.fingerprint[:12]}) is not the tokenizer of student.checkpoint "
            f"{student_from.path} ({student_from.tokenizer_fingerprint[:12]})",
            hint="leave data.tokenizer out to use the checkpoint's",
        )
    return tokenizer


def with_vocab(model: Model, tokenizer, whose: str) -> Model:
    """The section with its vocabulary filled in; it may be wider than the tokenizer's, never narrower."""
    size = model.vocab_size or tokenizer.vocab_size
    if size < tokenizer.vocab_size:
        raise ConfigError(
            f"{whose} has a vocabulary of {size} ids, the tokenizer {tokenizer.vocab_size}",
            hint="leave model.vocab_size out, or use the tokenizer that belongs to the model",
        )
    return model.model_copy(update={"vocab_size": size})


def check_teacher(config: Config, teacher: Checkpoint, tokenizer) -> None:
    """Raises unless the teacher speaks the same tokens and fits the layout."""
    if teacher.tokenizer_fingerprint != tokenizer.fingerprint:
        theirs = (teacher.tokenizer_fingerprint or "none recorded")[:12]
        raise CheckpointError(
            f"teacher {teacher.path} was trained with tokenizer {theirs} ({teacher.model.vocab_size} ids), "
            f"this run uses {tokenizer.fingerprint[:12]} ({tokenizer.vocab_size} ids)",
            hint="logits can be compared only over one vocabulary: prepare the data with the teacher's tokenizer",
        )
    with_vocab(teacher.model, tokenizer, f"teacher {teacher.path}")
    check_model(config, teacher.model, f"teacher {teacher.path}")


def check_padding(padded_size: int, tp: int) -> None:
    if padded_size % tp:
        raise ConfigError(
            f"the padded vocabulary of {padded_size} columns does not divide over parallel.tp = {tp} ranks",
            hint="choose a power of two for parallel.tp",
        )


def check_teacher_knows(setup: Setup, metrics: dict[str, float]) -> None:
    """A teacher whose CE is that of a guess was not loaded, or belongs to other data: refuse to learn from it."""
    if setup.teacher is None or setup.config.teacher.allow_weak or "teacher_ce" not in metrics:
        return
    chance, source = math.log(setup.tokenizer.vocab_size), setup.config.teacher.cache or setup.config.teacher.checkpoint
    if not metrics["teacher_ce"] < chance - 0.1:
        raise TrainingError(
            f"the teacher's cross-entropy on the first batch is {metrics['teacher_ce']:.3f} nats, guessing gives "
            f"{chance:.3f}: {source} knows nothing about this data",
            hint="check that the teacher is trained; set teacher.allow_weak=true to learn from it all the same",
        )
