"""`stopped.json`: how a launch says that it ended by itself, for job scripts; torchrun's exit code does not tell."""

import json
import pathlib

from megakd.publish import publish_text

STOP_FILE = "stopped.json"


def write_stopped(folder: str | pathlib.Path, *, finished: bool, **reached: int) -> None:
    """Say that a launch has stopped, all it did being on the disk. One process calls it.

    Args:
        folder: of the run, or of the cache.
        finished: nothing is left to do.
        reached: how far it came, such as `step`.
    """
    publish_text(pathlib.Path(folder) / STOP_FILE, json.dumps({**reached, "finished": finished}) + "\n")


def clear_stopped(folder: str | pathlib.Path) -> None:
    """A launch begins, and what an earlier one said is no longer so."""
    (pathlib.Path(folder) / STOP_FILE).unlink(missing_ok=True)
