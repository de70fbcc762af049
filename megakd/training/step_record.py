"""Recording a step into the run folder: what it computed, and the weights that it began from."""

import dataclasses
import logging
import pathlib

import torch
import torch.distributed as dist

from megakd.assembly.data import describe_data
from megakd.assembly.saving import save_weights
from megakd.assembly.setup import Setup
from megakd.cache.fingerprint import folder_fingerprint
from megakd.checkpoints import folder
from megakd.config import Config
from megakd.errors import ConfigError, StepError
from megakd.models.groups import layout
from megakd.models.micro_batch import MicroBatch
from megakd.publish import make_folder, publish_written, remove
from megakd.ranks import from_rank_0
from megakd.steps.folder import WEIGHTS, step_name, write_rank, write_record
from megakd.teachers.online import OnlineTeacher
from megakd.teachers.several import SeveralTeachers
from megakd.training.run_folder import versions
from megakd.training.step import StudentStep
from megakd.training.witness import StepWitness, unseen_axes

LOG = logging.getLogger("megakd")
FOLDER = "steps"  # in the run folder


def check_recording(setup: Setup) -> None:
    """Raises ConfigError where no step of this run could be replayed."""
    rates = {name: getattr(setup.model, name) for name in ("hidden_dropout", "attention_dropout")}
    dropout = {name: rate for name, rate in rates.items() if rate}
    if setup.config.run.record_steps and dropout:
        raise ConfigError(
            f"run.record_steps, but the student has {dropout}: its random numbers belong to one layout",
            hint="record a run without dropout (student.model.hidden_dropout=0 student.model.attention_dropout=0)",
        )

    axes = unseen_axes(setup.config.parallel)
    if setup.config.run.record_steps and axes:
        raise ConfigError(
            f"run.record_steps with {axes}: a rank's own part of a step is not described",
            hint="record a run without it; other axes give the same numbers",
        )


@dataclasses.dataclass
class StepRecorder:
    """Records the steps of a run that run.record_steps names, below `steps` in the run folder.

    Attributes:
        setup, student: of the run.
    """

    setup: Setup
    student: StudentStep

    def begin(self, step: int, micro_batches: list[MicroBatch]) -> StepWitness:
        """Whom to call as a witness to a step, which has not begun.

        Raises:
            StepError: on every rank; the disk does not take it.
        Collectives: one broadcast; those of saving the weights, if they cannot be drawn or read again.
        """
        begin_folder(self.path(step))
        if step > 1:
            save_weights(folder.incomplete(self.path(step)) / WEIGHTS, self.setup, step - 1)
        return StepWitness(self.student.gpt, self.student.groups, micro_batches, self.setup.samples(step - 1))

    def finish(self, step: int, witness: StepWitness, metrics: dict[str, float] | None) -> None:
        """Write what the witness has seen and publish the folder; nothing of a step that was left out.

        Args:
            metrics: of the step; None: it has none, because nothing of its batch was supervised or it broke.
        Raises:
            StepError: on every rank.
        """
        path = self.path(step)
        if metrics is None:
            from_rank_0(lambda: remove(folder.incomplete(path)))
            LOG.warning("step %d is not recorded: it was left out", step)
            return
        weights = self.weights(step)
        write_step(path, witness, step_values(self.setup, step, metrics, weights))
        LOG.info("step %d is recorded in %s; `megakd replay` computes it again", step, path)

    def path(self, step: int) -> pathlib.Path:
        return pathlib.Path(self.setup.config.run.dir) / FOLDER / step_name(step)

    def weights(self, step: int) -> dict[str, str]:
        """Where the weights before a step are from."""
        if step > 1:
            return {"from": "folder"}
        if self.setup.origin is None:
            return {"from": "drawn"}
        return {"from": "checkpoint", "path": str(self.setup.origin), "fingerprint": fingerprint(self.setup.origin)}


def fingerprint(checkpoint: pathlib.Path) -> str:
    """Of a checkpoint's files, read by rank 0."""
    return from_rank_0(lambda: folder_fingerprint(checkpoint))


def step_values(setup: Setup, step: int, metrics: dict[str, float], weights: dict[str, str]) -> dict:
    """What step.json says of a step."""
    live = isinstance(setup.teacher, OnlineTeacher | SeveralTeachers)
    kind = "none" if setup.teacher is None else "online" if live else "cached"
    cuda = setup.device.type == "cuda"
    return {
        "step": step,
        "layout": layout(setup.groups),
        "weights": weights,
        "settings": settings_of(setup.config),
        "model": setup.model.model_dump(mode="json"),
        "teacher": {
            "kind": kind,
            "model": setup.teacher_models[0].model_dump(mode="json") if len(setup.teacher_models) == 1 else None,
        },
        "data": describe_data(setup.config, setup.train_data, None),
        "tokenizer": setup.tokenizer.fingerprint,
        "precision": setup.config.train.precision,
        "device": torch.cuda.get_device_name(setup.device) if cuda else "cpu",
        "metrics": {name: value for name, value in metrics.items() if isinstance(value, int | float)},
        "versions": versions(),
    }


def settings_of(config: Config) -> dict:
    """The run's dotted keys with values as JSON has them."""

    def flat(values: dict, prefix: str) -> dict:
        found = {}
        for name, value in values.items():
            found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
        return found

    return flat(config.model_dump(mode="json"), "")


def begin_folder(path: pathlib.Path) -> None:
    """Make the empty folder that the ranks write into, over the remains of an interrupted one.

    Raises:
        StepError: on every rank.
    """

    def begin() -> None:
        try:
            remove(folder.incomplete(path))
            make_folder(folder.incomplete(path))
        except OSError as error:
            raise unwritable(path, error) from error

    from_rank_0(begin)


def write_step(path: pathlib.Path, witness: StepWitness, values: dict) -> None:
    """Write every rank's file and the record into the folder that `begin_folder` made, and give it its name.

    Raises:
        StepError: on every rank; nothing of it is left.
    Collectives: one all-gather of a short record, one broadcast.
    """
    partial, own = folder.incomplete(path), None
    try:
        own = write_rank(partial, dist.get_rank(), witness.part())
        failure = None
    except OSError as error:
        failure = f"rank {dist.get_rank()}: {error}"
    all_R = [None] * dist.get_world_size()
    dist.all_gather_object(all_R, (failure, own))

    def publish() -> None:
        failed = [text for text, _ in all_R if text is not None]
        try:
            if failed:
                raise OSError(failed[0])
            write_record(partial, values | {"ranks": [entry for _, entry in all_R]})
            publish_written(partial, path)
        except OSError as error:
            remove(partial)
            raise unwritable(path, error) from error

    from_rank_0(publish)


def unwritable(path: pathlib.Path, error: OSError) -> StepError:
    return StepError(
        f"the recorded step {path} cannot be written: {error}",
        hint="free space on that disk or make it writable, or leave run.record_steps out",
    )
