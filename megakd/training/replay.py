"""Computing a recorded step again, at another layout, version or device, and comparing what comes out."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator

from megakd.assembly.setup import Setup, build_setup
from megakd.cache.fingerprint import folder_fingerprint
from megakd.config import Config
from megakd.converters.direct import open_checkpoint
from megakd.errors import ConfigError, StepError, TrainingError
from megakd.ownership import Taken, check_owner, owning
from megakd.publish import make_folder
from megakd.ranks import Ranks, from_rank_0
from megakd.steps.comparison import check_settings, check_student, compare_records
from megakd.steps.folder import WEIGHTS, StepRecord, read_record, step_name
from megakd.training.optimizer import build_optimizer, wrap_data_parallel
from megakd.training.step import StudentStep
from megakd.training.step_record import begin_folder, settings_of, step_values, unwritable, write_step
from megakd.training.witness import StepWitness, unseen_axes

FOLDER = "replays"  # in the run folder


def replay(path: pathlib.Path, config: Config, ranks: Ranks, flags: dict[str, float]) -> tuple[str, bool]:
    """Compute a recorded step with this launch's ranks, keep it in `replays` in the run folder, and compare.

    Args:
        path: the record.
        config: of the run, at any layout; the step's weights are looked up by what the record says of them.
        flags: fields of Tolerance that are not to be the precision's.
    Returns:
        The comparison in words, and whether something differs; the same on every rank.
    Raises:
        StepError, ConfigError: the record cannot be read, or is of another run; another replay writes there.
    Collectives: those of a step, and some broadcasts.
    """
    if problem := unseen_axes(config.parallel):
        raise ConfigError(
            f"a step cannot be replayed with {problem}: a rank's own part of it is not described",
            hint="replay with the other axes; they give the same numbers",
        )
    record = from_rank_0(lambda: read_record(path))
    check_settings(record, settings_of(config), "this config")
    config = with_weights(config, record)
    step = record.values["step"]
    kept = pathlib.Path(config.run.dir) / FOLDER / step_name(step)
    with owned(kept) as check_owned:
        setup = build_setup(config, ranks.device)
        check_student(record, setup.model.model_dump(mode="json"), setup.tokenizer.fingerprint, "this config")
        witness, metrics = compute(setup, step)
        check_owned()
        begin_folder(kept)
        write_step(kept, witness, step_values(setup, step, metrics, record.values["weights"]))
        return from_rank_0(lambda: compare_records(record, read_record(kept), flags))


@contextlib.contextmanager
def owned(path: pathlib.Path) -> Iterator[Callable[[], None]]:
    """Own the folder of a step until the block ends; gives what says whether it still is this launch's.

    Raises:
        ConfigError, StepError: on every rank; another launch owns it, or nothing can be written there.
    Collectives: one broadcast, and one for each question.
    """
    lock = path.with_name(f"{path.name}.lock")
    with contextlib.ExitStack() as held:

        def take() -> None:
            try:
                make_folder(path.parent)
                held.enter_context(owning(lock, remove=True))
            except Taken as holder:
                raise ConfigError(
                    f"{path} is being written by another replay ({holder})",
                    hint="wait for it to end, or give this one a folder of its own: run.dir=FOLDER",
                ) from None
            except OSError as error:
                raise unwritable(path, error) from error

        def check() -> None:
            try:
                check_owner(lock)
            except OSError as error:
                raise unwritable(path, error) from error

        from_rank_0(take)
        yield lambda: from_rank_0(check)


def compute(setup: Setup, step: int) -> tuple[StepWitness, dict[str, float]]:
    """Forward and backward pass of a step on the weights of the setup; nothing is updated.

    Raises:
        TrainingError: on every rank; it breaks, or nothing of its batch is supervised.
    """
    ddp = wrap_data_parallel(setup.student, setup.config, setup.groups)
    optimizer, scheduler = build_optimizer(ddp, setup.config, setup.steps, setup.groups)
    optimizer.reload_model_params()
    student = StudentStep(
        setup.student, ddp, setup.teacher, setup.features, setup.loss, optimizer, scheduler, setup.groups,
        routing=setup.routing,
    )  # fmt: skip
    micro_batches = setup.batch(step - 1)
    witness = StepWitness(setup.student, setup.groups, micro_batches, setup.samples(step - 1))
    metrics = student.derive(micro_batches, step=step, measure=True, witness=witness)
    if metrics is None:
        raise TrainingError(
            f"step {step}: nothing in its batch is supervised", hint="is data.train that of the recorded run?"
        )
    return witness, metrics


def with_weights(config: Config, record: StepRecord) -> Config:
    """The config with the student that the recorded step began from.

    Raises:
        StepError, ConfigError: on every rank; it is not there.
    """
    weights, step = record.values["weights"], record.values["step"]
    if weights["from"] == "drawn":
        if config.student.model is None:
            raise ConfigError(
                f"{record.path} began from weights that were drawn from run.seed, this config from the checkpoint "
                f"{config.student.checkpoint}",
                hint="use the config.yaml of the recorded run",
            )
        return config
    if weights["from"] == "checkpoint":
        from_rank_0(lambda: check_start(record, config))
        return config
    folder = record.path / WEIGHTS
    if not from_rank_0(folder.is_dir):
        raise StepError(
            f"{folder} is missing: step {step} can be computed again only from the weights of step {step - 1}",
            hint="copy the whole folder of the record, or compare two records: megakd replay FOLDER FOLDER",
        )
    student = config.student.model_copy(update={"checkpoint": str(folder), "model": None})
    return config.model_copy(update={"student": student})


def check_start(record: StepRecord, config: Config) -> None:
    """Raises ConfigError where the student's checkpoint is not the one that the record began from."""
    path = config.student.checkpoint
    known = record.values["weights"]
    opened = None if path is None else open_checkpoint(path, config.checkpoint.verify, progress=False).path
    if opened is None or folder_fingerprint(opened) != known["fingerprint"]:
        raise ConfigError(
            f"{record.path} began from the checkpoint {known['path']}, this config from "
            f"{opened or 'weights that are drawn'}, which is another one",
            hint="student.checkpoint names the checkpoint, or a copy of it, that the recorded run began from",
        )
