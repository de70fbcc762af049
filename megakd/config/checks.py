"""Checks of a configuration against what only the launch or a checkpoint knows: ranks, vocabulary, architecture."""

import math
from collections.abc import Iterator

from megakd.config.config import Config
from megakd.config.fit import EVEN, model_problems, nearest_divisors, stages_of
from megakd.config.model import Model
from megakd.config.problems import problems_error
from megakd.errors import ConfigError


def check_ranks(config: Config, world_size: int) -> int:
    """Checks that the ranks carry the layout and that the batch divides over them.

    Args:
        config: of the run.
        world_size: number of ranks of the launch.

    Returns:
        dp, the number of data parallel copies.

    Raises:
        ConfigError: world_size is not divisible by tp * pp * cp, global_batch_size not by micro_batch_size * dp, or the
            ranks of a stage not by ep.
    """
    tp, pp = config.parallel.tp, config.parallel.pp
    cp = f" / cp {config.parallel.cp}" if config.parallel.cp > 1 else ""
    dp = check_layout(config, world_size)
    micro, batch = config.train.micro_batch_size, config.train.global_batch_size
    if batch % (micro * dp):
        raise ConfigError(
            f"train.global_batch_size {batch} is not divisible by train.micro_batch_size {micro} x dp {dp} "
            f"= {micro * dp} ({world_size} ranks / tp {tp} / pp {pp}{cp} = dp {dp})",
            hint=f"make train.global_batch_size a multiple of {micro * dp}, or start another number of ranks",
        )
    students = config.students_per_teacher
    if dp % students:
        raise ConfigError(
            f"teacher.parallel.tp {students * tp} takes the ranks of {students} student replicas, and {world_size} "
            f"ranks / tp {tp} / pp {pp} make {dp}",
            hint=f"start a multiple of {students * tp * pp} ranks, or set teacher.parallel.tp to "
            f"{tp * math.gcd(dp, students)}",
        )
    number = batch // (micro * dp)
    if config.parallel.vpp > 1 and number % pp:
        nearest = -(-number // pp) * pp * micro * dp
        raise ConfigError(
            f"train.global_batch_size {batch} gives each of {dp} data parallel ranks {number} micro-batches, which "
            f"parallel.pp {pp} does not divide; the stages of parallel.vpp {config.parallel.vpp} take {pp} at a time",
            hint=f"set train.global_batch_size to {nearest}, or parallel.vpp to 1",
        )
    return dp


def check_layout(config: Config, world_size: int) -> int:
    """Checks that the ranks carry the layout, whatever the batch; returns dp, or raises ConfigError."""
    tp, pp, cp = config.parallel.tp, config.parallel.pp, config.parallel.cp
    size = tp * pp * cp
    if world_size % size:
        factors = f"parallel.tp {tp} x parallel.pp {pp}" + (f" x parallel.cp {cp}" if cp > 1 else "")
        raise ConfigError(
            f"{world_size} ranks do not make whole models: {factors} = {size} ranks each",
            hint=f"start a multiple of {size} ranks (`torchrun --nproc-per-node {size} -m megakd ...`), "
            "or change the parallel section",
        )
    ep, stage = config.parallel.ep, world_size // pp
    if stage % ep:
        fitting = " or ".join(str(n) for n in nearest_divisors(stage, ep))
        raise ConfigError(
            f"parallel.ep {ep} does not divide the {stage} ranks of a pipeline stage ({world_size} ranks / pp {pp})",
            hint=f"set parallel.ep to {fitting}, or start another number of ranks",
        )
    return world_size // size


def check_experts(config: Config, student: Model, teacher: Model | None) -> None:
    """Checks that expert parallel has experts to divide.

    Args:
        teacher: None without one that runs.

    Raises:
        ConfigError: parallel.ep is above 1, and neither model has experts.
    """
    if config.parallel.ep > 1 and student.moe is None and (teacher is None or teacher.moe is None):
        raise ConfigError(
            f"parallel.ep is {config.parallel.ep}, but neither student nor teacher has experts"
            if teacher
            else f"parallel.ep is {config.parallel.ep}, but the student has no experts, and no teacher runs",
            hint="leave parallel.ep out: the ranks are then data parallel",
        )


def check_vocab(config: Config, vocab_size: int) -> None:
    """Checks that the teacher has `loss.top_k` entries to keep.

    Args:
        config: of the run; without a teacher nothing is checked.
        vocab_size: real vocabulary of the tokenizer, in ids.

    Raises:
        ConfigError: loss.top_k exceeds the vocabulary.
    """
    if config.teacher is not None and config.loss.top_k > vocab_size:
        raise ConfigError(
            f"loss.top_k {config.loss.top_k} exceeds the vocabulary of {vocab_size} ids",
            hint=f"lower loss.top_k to at most {vocab_size}",
        )


def check_model(config: Config, model: Model, whose: str, *, trained: bool = False, beside: bool = False) -> None:
    """Checks that an architecture read from a checkpoint fits the run's layout and sequence length.

    Args:
        config: of the run.
        model: architecture of the checkpoint.
        whose: what the error calls it, such as `teacher.checkpoint runs/teacher`.
        trained: it is the student.
        beside: it is a teacher that runs beside a student, in its own layout where it has one.

    Raises:
        ConfigError: lists all that does not fit.
    """
    pipeline = config.student.pipeline if trained else config.teacher.pipeline if config.teacher else EVEN
    length = config.data.sequence_length
    if beside:
        problems = list(teacher_model_problems(config, model))
    else:
        problems = list(model_problems(model, config.parallel, length, pipeline, trained=trained))
    if trained:
        problems += config.routing.model_problems(model)
    if problems:
        raise problems_error(
            whose,
            [f"{key}: {text}" for key, text in problems],
            hint="change the parallel section, or data.sequence_length, to what this model allows",
        )


def teacher_model_problems(config: Config, model: Model) -> Iterator[tuple[str, str]]:
    """Yields (key, what is wrong) with the architecture of a teacher that runs beside a student."""
    wider, parallel = config.students_per_teacher > 1, config.teacher_parallel
    tp_key = "teacher.parallel.tp" if wider else "parallel.tp"
    yield from model_problems(
        model, parallel, config.data.sequence_length, config.teacher.pipeline, trained=False, tp_key=tp_key
    )
    if wider and model.mla is not None and model.mla.q_lora_rank is None:
        yield (
            "mla.q_lora_rank",
            f"null, but Megatron-Core cuts such a model's queries over parallel.tp = {config.parallel.tp} alone; "
            "expected teacher.parallel = null",
        )


def check_features(config: Config, student: Model, teacher: Model) -> None:
    """Checks that the layers of the features section exist and that pairs share a pipeline stage.

    Raises:
        ConfigError: lists all that does not fit.
    """
    if config.features is None:
        return
    pp = config.parallel.pp
    problems = config.features.layer_problems(
        stages_of(student.num_layers, pp, config.student.pipeline),
        stages_of(teacher.num_layers, pp, config.teacher.pipeline),
    )
    lines = [f"{key}: {text}" for key, text in problems]
    if lines:
        raise problems_error("features", lines, hint="choose layers that both models have, on one stage each pair")
