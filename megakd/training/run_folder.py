"""The run folder: its config, whether a run continues in it, and from where."""

import contextlib
import pathlib
import secrets
from collections.abc import Iterator

from megakd import __version__, ownership
from megakd.checkpoints import folder
from megakd.checkpoints.folder import Checkpoint, step_folders
from megakd.config import Config
from megakd.errors import ConfigError
from megakd.ownership import Taken, owning
from megakd.publish import make_folder, publish_text, sweep, sync_folder
from megakd.ranks import from_rank_0
from megakd.stopped import clear_stopped
from megakd.training.fallback import check_nothing_is_passed_over, check_order, newest_checkpoint

CONFIG_FILE, OWNER_FILE = "config.yaml", "owner.lock"
# What may differ between launches of one run: where and how fast it runs, never what it computes.
FREE = (
    "run.dir",
    "run.device",
    "run.resume",
    "run.allow_change",
    "run.stop_after",
    "run.timeout_seconds",
    "run.watchdog_seconds",
    "run.record_steps",
    "parallel",
    "data.verify",
    "student.pipeline",
    "teacher.pipeline",
    "train.micro_batch_size",
    "train.recompute",
    "eval",
    "cache",
    "prune",
    "checkpoint",
    "export",
    "log",
    "rollouts.concurrency",
    "rollouts.server",
    "teacher.allow_weak",
    "teacher.cache_checks",
)


def open_run_folder(config: Config, held: contextlib.ExitStack) -> Checkpoint | None:
    """Make the folder or check that the run in it is this one, and write the resolved config.

    The folder belongs to one launch at a time: a second one is refused on a file system whose locks hold across
    machines, and elsewhere the first one stops at its next checkpoint.

    Args:
        held: rank 0 hangs its lock on it; the folder is given back when it is closed.
    Returns:
        The checkpoint to continue from; None to start.
    Raises:
        ConfigError, CheckpointError: on every rank.
    Collectives: one broadcast; rank 0 alone touches the folder.
    """
    return from_rank_0(lambda: _open(config, held))


@contextlib.contextmanager
def take(run_dir: pathlib.Path) -> Iterator[None]:
    """Make this process the owner of a run folder, until the block ends."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(owning(run_dir / OWNER_FILE))
        except Taken as holder:
            raise ConfigError(
                f"run.dir {run_dir} is in use by another launch ({holder})",
                hint="wait for it to end, or choose another run.dir",
            ) from None
        except OSError as error:
            raise ConfigError(
                f"run.dir {run_dir} cannot be written: {error.strerror}", hint="choose a folder that can be written"
            ) from error
        yield


def check_owner(run_dir: str) -> None:
    """Raises OSError when another launch has taken the folder meanwhile. Rank 0 calls it."""
    ownership.check_owner(pathlib.Path(run_dir) / OWNER_FILE)


def write_run_files(config: Config) -> None:
    """The resolved config and the versions, once everything has been built. Rank 0 alone writes.

    Raises:
        ConfigError: on every rank.
    """

    def write():
        run_dir = pathlib.Path(config.run.dir)
        with _writing(run_dir):
            config.save(run_dir / CONFIG_FILE)
            publish_text(run_dir / "versions.txt", "".join(f"{line}\n" for line in versions()))

    from_rank_0(write)


def _open(config: Config, held: contextlib.ExitStack) -> Checkpoint | None:
    run_dir = pathlib.Path(config.run.dir)
    try:
        make_folder(run_dir)
    except OSError as error:
        raise ConfigError(
            f"run.dir {run_dir} cannot be made: {error.strerror}", hint="choose a folder that can be written"
        ) from error
    held.enter_context(take(run_dir))
    with _writing(run_dir):
        sweep(run_dir)
        folder.settle(run_dir)
    found = step_folders(run_dir)
    check_nothing_is_passed_over(run_dir, found)
    if not found and config.run.resume == "required":
        raise ConfigError(
            f"run.resume is required, but {run_dir} holds no whole checkpoint",
            hint="start with run.resume=auto, or correct run.dir",
        )
    if found and config.run.resume == "never":
        raise ConfigError(
            f"run.resume is never, but {run_dir} already holds {found[-1].name}",
            hint="choose another run.dir, or run.resume=auto to continue",
        )
    checkpoint = newest_checkpoint(config) if found else None
    if checkpoint:
        check_same_run(Config.load(run_dir / CONFIG_FILE), config)
        check_order(checkpoint, config)
    with _writing(run_dir):
        if folder.run_id(run_dir) is None:
            known = checkpoint.run if checkpoint else None
            publish_text(run_dir / folder.RUN_ID_FILE, f"{known or secrets.token_hex(8)}\n")
        clear_stopped(run_dir)
        sync_folder(run_dir)
    return checkpoint


@contextlib.contextmanager
def _writing(run_dir: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"run.dir {run_dir} cannot be written: {error}",
            hint="free space on that disk, give this user the right to write there, or choose another folder",
        ) from error


def check_same_run(old: Config, new: Config) -> None:
    """Raises ConfigError when a resumed run would compute something else than it did."""
    free = (*FREE, *new.run.allow_change)
    before, after = old.flat(), new.flat()
    changed = [
        key
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not any(key == f or key.startswith(f"{f}.") for f in free)
    ]
    if changed:
        lines = "".join(f"\n  {key}: was {before.get(key)}, is {after.get(key)}" for key in changed)
        raise ConfigError(
            f"{new.run.dir} holds a run with other settings:{lines}",
            hint="choose another run.dir, or name the keys in run.allow_change to change them on purpose",
        )


def versions() -> list[str]:
    import importlib.metadata
    import platform

    names = ["torch", "megatron-core", "transformer-engine", "apex", "triton", "sentencepiece"]
    lines = [f"megakd {__version__}", f"python {platform.python_version()}"]
    for name in names:
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return lines
