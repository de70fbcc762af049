"""From a config to live objects: tokenizer, architectures that fit each other, models with weights, data."""

import dataclasses
import logging
import math
import pathlib

import torch

from megakd.assembly.architectures import (
    check_padding,
    check_teacher,
    choose_tokenizer,
    read_both,
    read_one,
    with_vocab,
)
from megakd.assembly.cached import cached_teacher, open_caches
from megakd.assembly.data import describe_data, open_both, run_steps
from megakd.assembly.layout import describe_layout
from megakd.assembly.models import build_model
from megakd.assembly.prompts import open_prompts, open_rollout_prompts
from megakd.assembly.taught import Taught
from megakd.checkpoints.folder import Checkpoint
from megakd.config import Config, Loss, Model, check_experts, check_features, check_model, check_vocab
from megakd.data.blend import indices_of_step
from megakd.data.dataset import batch_length, load_batch
from megakd.data.order import split_batch, validation_indices
from megakd.data.prompts import Prompt
from megakd.models.features import FeatureLoss
from megakd.models.gpt import GPT, padded_vocab_size
from megakd.models.groups import WiderGroups, build_groups, build_wider_groups
from megakd.models.micro_batch import MicroBatch, build_micro_batch
from megakd.models.offload import Offload
from megakd.models.routing import RoutingLosses
from megakd.models.sharding import is_sharded
from megakd.ranks import from_rank_0
from megakd.teachers.cached import CachedTeacher
from megakd.teachers.lesson import TeacherSource
from megakd.teachers.several import SeveralTeachers
from megakd.teachers.whole import live_teacher

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
        teacher_models: the sections of teachers that run.
        student: this rank's part of the student, with weights.
        teacher: None for plain training.
        features: distances between hidden states, attached to the student; None without a features section.
        loss: the loss section that applies: CE alone without a teacher.
        train_data, validation_data: data sets as `megakd.data.sources.open_data` returns; validation may be None, and
            training data where the student writes them all.
        origin: the checkpoint that the student started from; None where its weights were drawn.
        routing: terms of the student's routers; None without experts.
        prompts: that the student completes, by their numbers; None without rollouts.
        shown: prompts that it completes at every validation, likewise.
        taught: which of several teachers teaches a sample; None where there are not several.
        wider: groups of a teacher that is cut over the ranks of several student replicas.
        ahead: the next step's micro-batches, for a teacher that reads what it says while the student computes.
    """

    config: Config
    device: torch.device
    groups: object
    tokenizer: object
    model: Model
    teacher_models: list[Model]
    student: GPT
    teacher: TeacherSource | None
    features: FeatureLoss | None
    loss: Loss
    train_data: object
    validation_data: object | None
    origin: pathlib.Path | None = None
    routing: RoutingLosses | None = None
    prompts: dict[int, Prompt] | None = None
    shown: dict[int, Prompt] | None = None
    taught: Taught | None = None
    wider: WiderGroups | None = None
    ahead: dict[int, list[MicroBatch]] = dataclasses.field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return run_steps(self.config, self.train_data)

    @property
    def counts(self) -> dict[str, int]:
        """Of the training data, and of prompts."""
        data = {} if self.train_data is None else self.train_data.counts
        return data if self.prompts is None else data | {"prompts": len(self.prompts)}

    def batch(self, step: int) -> list[MicroBatch]:
        """This data-parallel rank's micro-batches of a step; the first step is 0."""

        def load(step: int) -> list[MicroBatch]:
            indices = self.indices(step, self.config.train.global_batch_size)
            return self.load(self.train_data, indices, packed=self.config.data.packing)

        micro_batches = self.ahead.pop(step, None) or load(step)
        if isinstance(self.teacher, CachedTeacher) and step + 1 < self.steps:
            self.ahead = {step + 1: load(step + 1)}
            self.teacher.prefetch(self.ahead[step + 1])
        return micro_batches

    def samples(self, step: int) -> list[list]:
        """(epoch, index) of the samples of each of those micro-batches."""
        return self.split(self.indices(step, self.config.train.global_batch_size), self.train_data)

    def indices(self, step: int, samples: int) -> list[tuple[int, int]]:
        """(epoch, index) of the training data's samples in a step that takes so many of them."""
        return indices_of_step(self.train_data, self.config.run.seed, step, samples) if samples else []

    def split(self, indices: list, data=None) -> list[list]:
        """This data-parallel rank's micro-batches of a global batch of a data set's samples."""
        dp, size = self.groups.dp, self.config.train.micro_batch_size
        parts = split_batch(indices, dp.rank(), dp.size(), size)
        if self.taught is None:
            return parts
        mine = [index for part in parts for index in part]
        mine = self.taught.together(data, mine, validation=data is self.validation_data)
        return [mine[first : first + size] for first in range(0, len(mine), size)]

    @property
    def validation_samples(self) -> int:
        """Samples of one validation."""
        return min(self.config.eval.samples or len(self.validation_data), len(self.validation_data))

    def validation_batches(self):
        """This rank's micro-batches of the validation set, batch by batch."""
        size, data, samples = self.config.train.global_batch_size, self.validation_data, self.validation_samples
        for step in range(math.ceil(samples / size)):
            yield self.load(data, validation_indices(step, size, samples), packed=False)

    def load(self, data, indices: list, *, packed: bool) -> list[MicroBatch]:
        """This data-parallel rank's micro-batches of a global batch of a data set's samples.

        Args:
            data: anything with `length(*index)` and `sample(*index)`.
            packed: rows may hold several samples.
        """
        length = batch_length(data, indices, self.config.sequence_multiple)
        cut = (self.groups.cp.rank(), self.groups.cp.size())
        micro_batches = []
        for part in self.split(indices, data):
            teachers = None
            if self.taught is not None:
                validation = data is self.validation_data
                teachers = [self.taught.number(data, index, validation=validation) for index in part]
            loaded = load_batch(data, part, length)
            micro_batches.append(build_micro_batch(loaded, packed=packed, cut=cut, teachers=teachers).to(self.device))
        return micro_batches


def build_setup(config: Config, device: torch.device) -> Setup:
    """Read, check and build everything but the optimizer, cheapest checks first.

    Raises:
        ConfigError, CheckpointError, DataError: something is missing or does not fit together; before any weight
            is read.
    """
    student_from, teacher_from = from_rank_0(lambda: read_both(config))
    named = from_rank_0(lambda: [read_one(config, teacher.checkpoint) for teacher in config.teachers])
    tokenizer = choose_tokenizer(config, student_from)
    model = with_vocab(student_from.model if student_from else config.student.model, tokenizer, "the student")
    check_model(config, model, "the student", trained=True)
    check_vocab(config, tokenizer.vocab_size)
    vocab_size, padded_size = model.vocab_size, padded_vocab_size(model.vocab_size)
    caches = open_caches(config, tokenizer, model, teacher_from)
    if caches:
        vocab_size, teacher_from = caches[0].header.contents.vocab_size, None  # it need not run
    teachers_from = [teacher_from] if teacher_from else named
    for checkpoint in teachers_from:
        check_teacher(config, checkpoint, tokenizer)
        check_features(config, model, checkpoint.model)
        vocab_size = min(vocab_size, checkpoint.model.vocab_size)
        padded_size = max(padded_size, padded_vocab_size(checkpoint.model.vocab_size))
    teacher_models = [checkpoint.model for checkpoint in teachers_from]
    check_experts(config, model, next((one for one in teacher_models if one.moe), next(iter(teacher_models), None)))
    check_padding(padded_size, config.parallel.tp)
    wide = bool(teachers_from) and config.students_per_teacher > 1
    if wide:
        check_padding(padded_size, config.teacher_parallel.tp, "teacher.parallel.tp")
    prompts = open_rollout_prompts(config, tokenizer) if config.rollouts else None
    shown = config.eval.generate
    if shown is not None:
        shown = open_prompts(config, shown.prompts, shown.format, tokenizer, shown.max_new_tokens, shown.limit)
    train_data, validation_data = open_both(config, tokenizer)
    config.check_schedule(run_steps(config, train_data))
    groups = build_groups(
        config.parallel.tp, config.parallel.pp, config.run.seed, cp=config.parallel.cp, ep=config.parallel.ep
    )
    wider = build_wider_groups(groups, config.teacher_parallel.tp) if wide else None

    def build(name: str, section: Model, checkpoint: Checkpoint | None) -> GPT:
        if name == "student":
            parallel, train, pipeline = config.parallel, config.train, config.student.pipeline
            how = {}
        else:
            parallel, train, pipeline = config.teacher_parallel, config.teacher_train, config.teacher.pipeline
            how = {"sharded": parallel.shards("teacher"), "offload": config.teacher.offload, "wider": wider}
        return build_model(
            section, checkpoint, parallel, train, groups,
            vocab_size=vocab_size, padded_size=padded_size, device=device, seed=config.run.seed,
            name=name, pipeline=pipeline, local=name == "student" and config.student_writes, **how,
        )  # fmt: skip

    student = build("student", model, student_from)
    teacher, features, loss, models = None, None, loss_of(config), {"student": student}
    names = [f"teacher {teacher.name}" for teacher in config.teachers] or ["teacher"]
    for name, checkpoint in zip(names, teachers_from, strict=False):
        models[name] = build(name, checkpoint.model, checkpoint)
    LOG.info("%s", describe_layout(config.parallel, groups, models))
    if caches:
        data = describe_data(config, train_data, validation_data)
        teacher = cached_teacher(caches, config, groups, data, student.shard, device)
    elif teachers_from:
        gpts = [models[name] for name in names]
        if config.features:
            features = FeatureLoss(student, gpts[0], config.features, config.run.seed)
        teacher = teacher_of(config, gpts, loss, groups, wider)
    routing = RoutingLosses(student, config.routing) if model.moe else None
    return Setup(
        config, device, groups, tokenizer, model, teacher_models,
        student, teacher, features, loss, train_data, validation_data, student_from.path if student_from else None,
        routing, prompts, shown, Taught.of(config), wider,
    )  # fmt: skip


def teacher_of(config: Config, gpts: list[GPT], loss: Loss, groups, wider: WiderGroups | None) -> TeacherSource:
    """The live teacher, or all that the teachers section names, in its order."""
    live, sharing = [], wider.sharing if wider else None
    for gpt in gpts:
        offload = Offload(gpt) if config.teacher.offload and not is_sharded(gpt) else None
        live.append(live_teacher(gpt, loss, groups, config.run.seed, offload=offload, sharing=sharing))
    if not config.teachers:
        return live[0]
    names, weights = ([getattr(teacher, key) for teacher in config.teachers] for key in ("name", "weight"))
    return SeveralTeachers(live, names, weights, groups)


def loss_of(config: Config) -> Loss:
    """The loss section that applies; without a teacher cross-entropy alone, whatever the section says about one."""
    if config.teacher is not None:
        return config.loss
    if idle := config.idle_keys():
        LOG.info("there is no teacher: the loss is cross-entropy alone, without effect: %s", ", ".join(idle))
    return CE_ONLY.model_copy(update={"logits_memory_budget_bytes": config.loss.logits_memory_budget_bytes})
