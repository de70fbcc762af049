"""The run folder: its config, whether a run continues in it, and from where."""

import pathlib

import torch.distributed as dist

from megakd import __version__
from megakd.checkpoints.folder import Checkpoint, read_checkpoint, whole_checkpoints
from megakd.config import Config
from megakd.errors import ConfigError, MegakdError

CONFIG_FILE = "config.yaml"
# What may differ between launches of one run: where and how fast it runs, never what it computes.
FREE = (
    "run.dir",
    "run.device",
    "run.resume",
    "run.allow_change",
    "run.stop_after",
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


def open_run_folder(config: Config) -> Checkpoint | None:
    """Make the folder or check that the run in it is this one, and write the resolved config.

    Returns:
        The checkpoint to continue from; None to start.
    Raises:
        ConfigError, CheckpointError: on every rank.
    Collectives: one broadcast; rank 0 alone touches the folder.
    """
    result = [None]
    if dist.get_rank() == 0:
        try:
            result = [_open(config)]
        except MegakdError as error:
            result = [error]
    dist.broadcast_object_list(result)
    if isinstance(result[0], MegakdError):
        raise result[0]
    return result[0]


def _open(config: Config) -> Checkpoint | None:
    run_dir = pathlib.Path(config.run.dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"run.dir {run_dir} cannot be made: {error.strerror}", hint="choose a folder that can be written"
        ) from error
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
    config.save(run_dir / CONFIG_FILE)
    (run_dir / "versions.txt").write_text("".join(f"{line}\n" for line in versions()), encoding="utf-8")
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
