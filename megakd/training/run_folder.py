"""The run folder: its config, whether a run continues in it, and from where."""

import contextlib
import fcntl
import logging
import os
import pathlib
import socket
from typing import IO

from megakd import __version__
from megakd.checkpoints.folder import Checkpoint, read_checkpoint, whole_checkpoints
from megakd.config import Config
from megakd.errors import ConfigError
from megakd.ranks import from_rank_0

LOG = logging.getLogger("megakd")
CONFIG_FILE, OWNER_FILE, STOP_FILE = "config.yaml", "owner.lock", "stopped.json"
# What may differ between launches of one run: where and how fast it runs, never what it computes.
FREE = (
    "run.dir",
    "run.device",
    "run.resume",
    "run.allow_change",
    "run.stop_after",
    "run.timeout_seconds",
    "run.watchdog_seconds",
    "parallel",
    "train.micro_batch_size",
    "train.recompute",
    "eval",
    "cache",
    "checkpoint",
    "log",
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


def take(run_dir: pathlib.Path) -> IO:
    """Make this process the owner of a run folder, until the returned file is closed."""
    file = open(run_dir / OWNER_FILE, "a+", encoding="utf-8")  # noqa: SIM115  stays open
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise ConfigError(
            f"run.dir {run_dir} is in use by another launch ({holder})",
            hint="wait for it to end, or choose another run.dir",
        ) from error
    except OSError:
        LOG.warning("%s: this file system has no locks; see to it that only one launch uses the folder", run_dir)
    file.truncate(0)
    file.write(owner())
    file.flush()
    os.register_at_fork(after_in_child=file.close)  # a child that outlives this process must not hold the folder
    return file


def owner() -> str:
    return f"{socket.gethostname()} pid {os.getpid()} job {os.environ.get('SLURM_JOB_ID', '-')}"


def check_owner(run_dir: str) -> None:
    """Raises OSError when another launch has taken the folder meanwhile. Rank 0 calls it."""
    path = pathlib.Path(run_dir) / OWNER_FILE
    seen = path.read_text(encoding="utf-8") if path.exists() else owner()
    if seen != owner():
        raise OSError(f"{run_dir} was taken by another launch ({seen}); this one writes to it no more")


def write_run_files(config: Config) -> None:
    """The resolved config and the versions, once everything has been built. Rank 0 alone writes.

    Raises:
        ConfigError: on every rank.
    """

    def write():
        run_dir = pathlib.Path(config.run.dir)
        config.save(run_dir / CONFIG_FILE)
        try:
            (run_dir / "versions.txt").write_text("".join(f"{line}\n" for line in versions()), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{run_dir} cannot be written: {error}", hint="free space on that disk") from error

    from_rank_0(write)


def _open(config: Config, held: contextlib.ExitStack) -> Checkpoint | None:
    run_dir = pathlib.Path(config.run.dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"run.dir {run_dir} cannot be made: {error.strerror}", hint="choose a folder that can be written"
        ) from error
    held.enter_context(take(run_dir))
    found = whole_checkpoints(run_dir)
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
    checkpoint = read_checkpoint(found[-1]) if found else None
    if checkpoint:
        check_same_run(Config.load(run_dir / CONFIG_FILE), config)
    (run_dir / STOP_FILE).unlink(missing_ok=True)  # it speaks of an earlier launch
    return checkpoint


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
