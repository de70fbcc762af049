"""One run's configuration: read from YAML with overrides, checked as a whole, written back resolved."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from megakd.config import sections
from megakd.config.cache import Cache
from megakd.config.eval import Eval
from megakd.config.features import Features
from megakd.config.fit import model_problems
from megakd.config.keys import iter_keys, section_of
from megakd.config.layout import layout_problems, sequence_problems
from megakd.config.log import Log
from megakd.config.loss import Loss
from megakd.config.overrides import apply_overrides
from megakd.config.parallel import Parallel
from megakd.config.problems import explain, nearest_key, problems_error
from megakd.config.prune import Prune
from megakd.config.rollouts import Rollouts
from megakd.config.routing import Routing
from megakd.config.teachers import NamedTeacher, paths_of, teachers_problems
from megakd.config.yaml12 import format_yaml, parse_yaml
from megakd.errors import ConfigError
from megakd.publish import publish_text

LOGITS_BUDGET = "loss.logits_memory_budget_bytes"  # the one key of its section that needs no teacher


class Config(sections.Section):
    """Everything a run needs to know, frozen; sections are attributes, `config.train.global_batch_size`."""

    run: sections.Run
    parallel: Parallel = Parallel()
    student: sections.Student
    teacher: sections.Teacher | None = None
    teachers: list[NamedTeacher] = Field([])
    loss: Loss = Loss()
    features: Features | None = None
    routing: Routing = Routing()
    data: sections.Data
    rollouts: Rollouts | None = None
    cache: Cache = Cache()
    prune: Prune = Prune()
    train: sections.Train
    optimizer: sections.Optimizer
    schedule: sections.Schedule = sections.Schedule()
    eval: Eval = Eval()
    checkpoint: sections.Checkpoint = sections.Checkpoint()
    export: sections.Export = sections.Export()
    log: Log = Log()

    @model_validator(mode="before")
    @classmethod
    def _several_teachers(cls, values: Any) -> Any:
        """What holds for all of several teachers stands in the teacher section, which is there where they are."""
        if isinstance(values, Mapping) and values.get("teachers") and values.get("teacher") is None:
            return {**values, "teacher": {}}
        return values

    @classmethod
    def load(cls, path: str | os.PathLike, overrides: Sequence[str] = ()) -> "Config":
        """Reads a YAML file and applies dotted overrides (`train.steps=20`) before anything is checked.

        Raises:
            ConfigError: the file cannot be read, is not UTF-8 or not YAML, or the values are wrong; lists every
                problem with its dotted key, the value seen and what was expected.
        """
        values = parse_yaml(_read_text(path), str(path))
        values = {} if values is None else values
        overridden = apply_overrides(values, list(overrides)) if isinstance(values, dict) else []
        return cls.from_dict(values, where=str(path), overridden=overridden)

    @classmethod
    def from_arguments(cls, arguments: Sequence[str]) -> "Config":
        """Reads what follows the verb of a run on the command line: `CONFIG.yaml [key=value ...]`.

        Raises:
            ConfigError: there is no config file among the arguments, or as for `load`.
        """
        if not arguments or ("=" in arguments[0] and not os.path.exists(arguments[0])):
            seen = f"`{arguments[0]}`" if arguments else "nothing"
            raise ConfigError(
                f"command line: expected a config file after the verb, got {seen}",
                hint="megakd VERB CONFIG.yaml [key=value ...]",
            )
        return cls.load(arguments[0], arguments[1:])

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "config", overridden: Sequence[str] = ()) -> "Config":
        """Checks nested dictionaries as `load` does; `where` names their origin in an error."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise explain(error, cls, where, overridden) from None

    def save(self, path: str | os.PathLike) -> None:
        """Writes the resolved YAML; whoever reads `path` sees the old file or the whole new one.

        Raises:
            ConfigError: the file cannot be written.
        """
        try:
            publish_text(path, format_yaml(self.model_dump(mode="json")))
        except OSError as error:
            raise ConfigError(
                f"{path}: the configuration cannot be written: {error.strerror}",
                hint="check that the folder exists, is writable, and has space left",
            ) from error

    def flat(self) -> dict[str, Any]:
        """Every dotted key with its value; a section that is null is one key with value None."""
        return _flat(self, "")

    @property
    def teacher_train(self) -> sections.Train:
        """The train section as it applies to a teacher that runs."""
        precision = self.teacher.precision or self.train.precision
        return self.train.model_copy(update={"precision": precision})

    @property
    def teacher_parallel(self) -> Parallel:
        """The layout of a teacher beside a student."""
        own = self.teacher.parallel if self.teacher is not None else None
        changes = {} if own is None else {"tp": own.tp, "sp": self.parallel.sp if own.sp is None else own.sp}
        return self.parallel.of_teacher.model_copy(update=changes)

    @property
    def students_per_teacher(self) -> int:
        """Student replicas whose ranks are those of one replica of the teacher."""
        return max(self.teacher_parallel.tp // self.parallel.tp, 1)

    @property
    def sequence_multiple(self) -> int:
        """What the length of a row must be divisible by, for both models."""
        return math.lcm(self.parallel.sequence_multiple, self.teacher_parallel.sequence_multiple)

    @property
    def reads_no_data(self) -> bool:
        """Whether the student writes all that it learns from."""
        return self.rollouts is not None and self.rollouts.fraction == 1

    @property
    def student_writes(self) -> bool:
        """Whether the student is to generate where it is trained."""
        return self.eval.writes or (self.rollouts is not None and self.rollouts.engine == "megakd")

    def idle_keys(self) -> list[str]:
        """The keys that say something about a teacher, where there is none: a run on the data alone ignores them."""
        if self.teacher is not None:
            return []
        given, default = _flat(self.loss, "loss."), _flat(Loss(), "loss.")
        names = [name for name, value in given.items() if value != default.get(name) and name != LOGITS_BUDGET]
        return names + ([] if self.features is None else ["features"])

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yields (dotted key, what is wrong) for every rule between sections that is broken."""
        yield from layout_problems(self)
        yield from self._teacher_problems()
        if self.student.model is not None:
            length, pipeline = self.data.sequence_length, self.student.pipeline
            for key, text in model_problems(self.student.model, self.parallel, length, pipeline, trained=True):
                yield (key if "." in key else f"student.model.{key}"), text
            yield from self.routing.model_problems(self.student.model)
            if self.data.tokenizer is None:
                yield (
                    "data.tokenizer",
                    "null, and a student.model has no tokenizer of its own; expected a tokenizer file",
                )
        yield from sequence_problems(self)
        if self.loss.targets == "sampled" and self.parallel.cp > 1:
            yield "loss.targets", f"sampled, but parallel.cp = {self.parallel.cp} cuts the samples that draws are of"
        if self.features is not None and self.teacher is not None and self.teacher.cache is not None:
            yield (
                "features",
                "given with teacher.cache; hidden states of layers are not recorded, expected a live teacher",
            )
        yield from self.eval.problems_in(self)
        if self.export.checkpoint == "best" and (self.data.validation is None or not self.checkpoint.keep_best):
            lacks = "data.validation is null" if self.data.validation is None else "checkpoint.keep_best is false"
            yield "export.checkpoint", f"best, but {lacks}; expected last"
        if self.rollouts is not None:
            yield from self.rollouts.problems_in(self)
        if self.data.train is None and not self.reads_no_data:
            yield "data.train", "missing; only a run whose rollouts.fraction is 1 does without"
        yield from self._schedule_problems(self.train.steps)
        yield from self._allow_change_problems()

    def _teacher_problems(self) -> Iterator[tuple[str, str]]:
        teacher = self.teacher
        if teacher is None:
            return
        if not self.teachers:
            if teacher.checkpoint is None and teacher.cache is None:
                yield "teacher.checkpoint", "neither checkpoint nor cache is given; expected one of them or both"
            return
        for key in ("checkpoint", "cache"):
            if getattr(teacher, key) is not None:
                yield f"teacher.{key}", f"{getattr(teacher, key)}, but teachers are given, which have their own"
        for key in ("features", "rollouts"):
            if getattr(self, key) is not None:
                yield key, "given with teachers, which teach sources of data; expected one teacher"
        sources = {f"data.{key}": paths_of(getattr(self.data, key)) for key in ("train", "validation")}
        yield from teachers_problems(self.teachers, sources)

    def check_schedule(self, steps: int) -> None:
        """Checks the learning rate's schedule against a number of steps that only the data could tell (train.epochs).

        Raises:
            ConfigError: the warm-up or the decay is longer than the run.
        """
        lines = [f"{key}: {text}" for key, text in self._schedule_problems(steps)]
        if lines:
            raise problems_error(f"the run has {steps} steps", lines, hint="shorten the schedule, or train for longer")

    def _schedule_problems(self, steps: int | None) -> Iterator[tuple[str, str]]:
        warmup, wsd, decay = self.schedule.warmup_steps, self.schedule.wsd_decay_steps, self.schedule.decay_steps
        named = {"the run's steps" if self.train.steps is None else "train.steps": steps, "schedule.decay_steps": decay}
        ends = {name: end for name, end in named.items() if end is not None}
        if not ends:
            return
        first = min(ends, key=ends.get)
        last = first if decay is None else "schedule.decay_steps"
        if warmup >= ends[first]:
            yield "schedule.warmup_steps", f"{warmup} must be below {first} = {ends[first]}"
        elif wsd is not None and warmup + wsd > ends[last]:
            yield "schedule.wsd_decay_steps", f"{wsd} and schedule.warmup_steps = {warmup} exceed {last} = {ends[last]}"

    def _allow_change_problems(self) -> Iterator[tuple[str, str]]:
        names = [key.name for key in iter_keys(Config)]
        for allowed in self.run.allow_change:
            if not any(name == allowed or name.startswith(f"{allowed}.") for name in names):
                meant = nearest_key(allowed, Config)
                yield "run.allow_change", f"{allowed!r} is no key" + (f"; did you mean {meant}?" if meant else "")


def _flat(section: sections.Section, prefix: str) -> dict[str, Any]:
    values = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, list):
            values[prefix + name] = [
                item.model_dump() if isinstance(item, sections.Section) else item for item in value
            ]
        elif section_of(field.annotation) and value is not None:
            values |= _flat(value, f"{prefix}{name}.")
        else:
            values[prefix + name] = value
    return values


def _read_text(path: str | os.PathLike) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 text: byte 0x{error.object[error.start]:02x} at offset {error.start}",
            hint="a run's configuration is YAML text; save the file as UTF-8",
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{path}: the config file cannot be read: {error.strerror}",
            hint="the config file comes first: `megakd VERB CONFIG.yaml [key=value ...]`",
        ) from error
