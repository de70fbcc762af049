"""Layouts in which a run fits into the memory of so many GPUs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megakd.config import Config, Model, check_ranks
from megakd.config.checks import teacher_model_problems
from megakd.config.fit import model_problems
from megakd.errors import ConfigError
from megakd.planning.memory import Memory, rank_memory
from megakd.planning.parameters import padded_vocab

PLANNED_SHARE = 0.9  # of a GPU's memory; the rest is the CUDA context's, NCCL's, and what is in pieces too small


@dataclass(frozen=True)
class Layout:
    """One that the config's own checks accept.

    Attributes:
        config: with its parallel section and recomputation.
        dp: data parallel copies.
        memory: of the fullest stage.
    """

    config: Config
    dp: int
    memory: Memory

    @property
    def model_ranks(self) -> int:
        parallel = self.config.parallel
        return parallel.tp * parallel.pp * parallel.cp

    def words(self) -> str:
        parallel = self.config.parallel
        axes = " ".join(f"{axis} {size}" for axis in ("tp", "pp", "cp", "ep") if (size := getattr(parallel, axis)) > 1)
        return f"{axes or 'tp 1'}, dp {self.dp}{', sp' if parallel.sp else ''}, recompute {self.config.train.recompute}"


def fullest_stage(
    config: Config, student: Model, teacher: Model | None, dp: int, others: Sequence[Model] = ()
) -> tuple[int, Memory]:
    """The pipeline stage with the most memory, and what it is.

    Args:
        others: of several teachers, those that are not `teacher`.
    """
    stages = [(stage, stage_memory(config, student, teacher, dp, stage, others)) for stage in range(config.parallel.pp)]
    return max(stages, key=lambda pair: pair[1].total)


def stage_memory(
    config: Config, student: Model, teacher: Model | None, dp: int, stage: int, others: Sequence[Model]
) -> Memory:
    """Of a rank: the weights of all teachers, or with teacher.offload of the largest; they run one after the other."""
    each = [rank_memory(config, student, one, dp, stage) for one in (teacher, *others)]
    together = max if config.teacher is not None and config.teacher.offload else sum
    most = {name: max(getattr(memory, name) for memory in each) for name in ("lessons", "working", "teacher_pass")}
    return replace(each[0], teacher=together([memory.teacher for memory in each]), **most)


def problems_of(
    config: Config, student: Model, teacher: Model | None, world_size: int, others: Sequence[Model] = ()
) -> list[str]:
    """What of a config and its models does not fit so many ranks, in the words of the launch itself."""
    found, length = [], config.data.sequence_length
    of_student = model_problems(student, config.parallel, length, config.student.pipeline, trained=True)
    found += [f"student: {key}: {text}" for key, text in of_student]
    if teacher:
        for one in (teacher, *others):
            found += [f"teacher: {key}: {text}" for key, text in teacher_model_problems(config, one)]
    found += [f"{key}: {text}" for key, text in config.problems()]
    padded = padded_vocab(max(model.vocab_size for model in (student, teacher, *others) if model))
    cuts = {"parallel.tp": config.parallel.tp}
    if config.students_per_teacher > 1:
        cuts["teacher.parallel.tp"] = config.teacher_parallel.tp
    for key, tp in cuts.items():
        if padded % tp:
            found.append(f"the padded vocabulary of {padded} columns does not divide over {key} = {tp}")
    try:
        check_ranks(config, world_size)
    except ConfigError as error:
        found.append(error.args[0])
    return found


def fitting_layouts(
    config: Config,
    student: Model,
    teacher: Model | None,
    nodes: int,
    gpus: int,
    memory_bytes: int,
    others: Sequence[Model] = (),
) -> list[Layout]:
    """Those that fit, the one with the fewest ranks to a model first: what is left is data parallel, which costs least.

    cp, ep, fsdp and the batch stay as they are; tp stays within a node. Recomputing costs a third of the student's
    arithmetic, so it comes after.
    """
    fitting = [
        layout
        for layout in possible_layouts(config, student, teacher, nodes, gpus, others)
        if layout.memory.total <= memory_bytes * PLANNED_SHARE
    ]
    return sorted(
        fitting,
        key=lambda layout: (
            layout.config.train.recompute == "full",
            layout.model_ranks,
            layout.config.parallel.pp,
            layout.memory.total,
        ),
    )


def possible_layouts(
    config: Config, student: Model, teacher: Model | None, nodes: int, gpus: int, others: Sequence[Model] = ()
) -> Iterator[Layout]:
    """Layouts that the checks accept, with the config's own recomputation and with that of whole layers."""
    kinds = dict.fromkeys((config.train.recompute, "full"))
    for tp in (2**power for power in range(gpus.bit_length())):
        for pp in range(1, nodes * gpus // tp + 1):
            parallel = config.parallel.model_copy(update={"tp": tp, "pp": pp, "vpp": 1, "sp": tp > 1})
            tried, size = config.model_copy(update={"parallel": parallel}), tp * pp * parallel.cp
            if (nodes * gpus) % size or problems_of(tried, student, teacher, nodes * gpus, others):
                continue
            dp = nodes * gpus // size
            for kind in kinds:
                train = config.train.model_copy(update={"recompute": kind})
                one = tried.model_copy(update={"train": train})
                yield Layout(one, dp, fullest_stage(one, student, teacher, dp, others)[1])
