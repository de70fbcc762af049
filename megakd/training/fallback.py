"""A damaged newest checkpoint is set aside, by its name and in the log, and the one before it used."""

import logging
import pathlib

from megakd.checkpoints import folder
from megakd.checkpoints.folder import Checkpoint, read_checkpoint, step_folders
from megakd.config import Config
from megakd.data.sources import order_version
from megakd.errors import CheckpointError, ConfigError, DamagedCheckpointError
from megakd.ranks import from_rank_0

LOG = logging.getLogger("megakd")


def newest_checkpoint(config: Config) -> Checkpoint:
    """The newest whole checkpoint of a run; damaged ones after it are set aside, unless run.resume is newest_only.

    Raises:
        CheckpointError: there is none left, or the newest is damaged and must not be passed over, or it cannot be used
            for another reason.
    """
    run_dir = pathlib.Path(config.run.dir)
    while found := step_folders(run_dir):
        try:
            return read_checkpoint(found[-1], config.checkpoint.verify)
        except DamagedCheckpointError as error:
            pass_over(config, found[-1], error)
    raise nothing_left(run_dir)


def pass_over(config: Config, path: pathlib.Path, error: DamagedCheckpointError) -> None:
    """Set a damaged checkpoint aside and say so; raise its error instead if run.resume is newest_only."""
    if config.run.resume == "newest_only":
        raise DamagedCheckpointError(
            f"run.resume is newest_only, and the newest checkpoint is damaged: {error.args[0]}",
            hint="run.resume=auto sets it aside and continues from the one before it",
        ) from error
    aside = folder.set_aside(path)
    LOG.warning(
        "the newest checkpoint is damaged and was set aside as %s; going back to the one before: %s",
        aside, error.args[0],
    )  # fmt: skip


def check_order(checkpoint: Checkpoint, config: Config) -> None:
    """Samples come in the order in which the run began to read them.

    Raises:
        ConfigError: they would not, and run.allow_change does not name data.train.
    """
    before, now = (checkpoint.data or {}).get("order", 1), order_version(config.data)
    if before == now:
        return
    said = (
        f"{checkpoint.path} was trained on data.train in order {before}, this megakd reads it in order {now}: what is "
        "left of the epoch would hold samples that were read already, and miss others"
    )
    if not {"data", "data.train"} & set(config.run.allow_change):
        raise ConfigError(
            said, hint="finish the run with the megakd that began it, or go on with run.allow_change=[data.train]"
        )
    LOG.warning("%s (run.allow_change)", said)


def older_checkpoint(config: Config, damaged: Checkpoint, error: DamagedCheckpointError) -> Checkpoint:
    """What to continue from when the checkpoint that was chosen turned out to be damaged while it was read.

    Raises:
        CheckpointError: on every rank, as newest_checkpoint.
    Collectives: one broadcast; rank 0 alone touches the folder.
    """

    def choose() -> Checkpoint:
        pass_over(config, damaged.path, error)
        checkpoint = newest_checkpoint(config)
        check_order(checkpoint, config)
        return checkpoint

    return from_rank_0(choose)


def check_nothing_is_passed_over(run_dir: pathlib.Path, found: list[pathlib.Path]) -> None:
    """Raises CheckpointError where a run would begin anew although checkpoints of it were set aside."""
    if not found and any((run_dir / "checkpoints").glob(f"*{folder.DAMAGED}*")):
        raise nothing_left(run_dir)


def nothing_left(run_dir: pathlib.Path) -> CheckpointError:
    aside = sorted(path.name for path in (run_dir / "checkpoints").glob(f"*{folder.DAMAGED}*"))
    return CheckpointError(
        f"{run_dir} holds no whole checkpoint any more: {', '.join(aside)} set aside as damaged",
        hint="put a whole copy of one in its place, or remove them to begin the run anew",
    )
