"""The completions that a run has learnt from, in `rollouts` in its folder.

    step_00000008.jsonl     what the weights after 8 optimizer steps have written

A line is a completion as `megakd generate` writes it (megakd.generation.results.describe), and before that `step`, the
optimizer step that learns from it (the first is 1), and `weights_step`, the steps that its writer had taken. A file is
there whole or not at all: what was being written when a launch was killed is written again, from the same seeds.
"""

import json
import logging
import pathlib
import re
from collections.abc import Iterable
from typing import NamedTuple

from megakd.errors import TrainingError
from megakd.generation.results import line_of
from megakd.publish import make_folder, publish_text, remove, sweep

LOG = logging.getLogger("megakd")
FOLDER = "rollouts"
NAME = re.compile(r"step_(\d{8,})\.jsonl")


class Rollout(NamedTuple):
    """A completion, as far as a step needs to know it.

    Attributes:
        prompt, completion: numbers of the prompt in its file and of the completion.
        prompt_ids, ids: of the prompt, and written.
        ended: by a stop, not by its length.
        weights_step: optimizer steps that the writer had taken.
        logprob: summed, as the writer itself gave it to its ids (nats); None where that is not known.
        settings: a digest of how it was written.
    """

    prompt: int
    completion: int
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    ended: bool
    weights_step: int
    logprob: float | None
    settings: str


class Kept:
    """The files of one run; for rank 0."""

    def __init__(self, run_dir: str):
        self.folder = pathlib.Path(run_dir) / FOLDER

    def path(self, weights_step: int) -> pathlib.Path:
        return self.folder / f"step_{weights_step:08d}.jsonl"

    def write(self, weights_step: int, lines: Iterable[dict]) -> None:
        """Publish what the weights of a step have written.

        Raises:
            TrainingError: the disk does not take it.
        """
        text = "".join(map(line_of, lines))
        try:
            make_folder(self.folder)
            publish_text(self.path(weights_step), text)
        except OSError as error:
            raise TrainingError(
                f"{self.path(weights_step)} cannot be written: {error}",
                hint="free space on that disk, then start the run again: it goes on from its last checkpoint",
            ) from error

    def read(self, weights_step: int) -> dict[int, list[Rollout]] | None:
        """Optimizer step (the first is 0) -> completions; None where there is no such file, or it is damaged."""
        path, found = self.path(weights_step), {}
        try:
            for text in path.read_text(encoding="utf-8").removesuffix("\n").split("\n"):  # other ends of lines are text
                line = json.loads(text)
                found.setdefault(line["step"] - 1, []).append(read_rollout(line))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            LOG.warning("%s is damaged, and left out: %s", path, error)
            return None
        return found

    def drop_after(self, step: int | None) -> None:
        """Remove what weights beyond a checkpoint's have written (None: everything): the run takes those steps again.

        Raises:
            TrainingError: something cannot be removed.
        """
        try:
            sweep(self.folder)
            for path in self.folder.iterdir() if self.folder.is_dir() else ():
                if (name := NAME.fullmatch(path.name)) and (step is None or int(name[1]) > step):
                    remove(path)
        except OSError as error:
            raise TrainingError(f"{self.folder}: {error}", hint="make that folder writable") from error


def read_rollout(line: dict) -> Rollout:
    """Of a line of a file; raises LookupError or TypeError where it is none."""
    prompt_ids, ids = (tuple(int(i) for i in line[name]) for name in ("prompt_ids", "completion_ids"))
    if not prompt_ids or not ids:
        raise TypeError("a completion without ids")
    numbers = (int(line[name]) for name in ("prompt_number", "completion_number"))
    logprobs = line.get("logprobs", ())
    logprob = sum(logprobs) if len(logprobs) == len(ids) and None not in logprobs else None
    ended, weights_step = line["finish_reason"] == "stop", int(line["weights_step"])
    return Rollout(*numbers, prompt_ids, ids, ended, weights_step, logprob, str(line.get("settings", "")))
