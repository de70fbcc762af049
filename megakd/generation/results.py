"""The file of what a model wrote, made so that a launch can be killed at any instant.

    OUTPUT              JSON lines in the order of the prompts and their completions; there once all of them are
    OUTPUT.info.json    the settings it was made with, and counts; written after it
    OUTPUT.parts/       until then: `settings.json`, and `*.part`, to which each model that generates appends the lines
                        of the completions it has finished

A line counts when its end is there: what a kill has cut off is written again. Every launch writes parts of its own, so
nothing is ever changed, and a completion that is in two of them (a launch that outlived its file lock) is taken once.
"""

import contextlib
import dataclasses
import json
import pathlib
import secrets
import shutil
from collections.abc import Iterator, Mapping
from typing import BinaryIO

import numpy as np

from megakd import __version__
from megakd.data.ids import SHOWN_DIGITS
from megakd.errors import ConfigError
from megakd.generation.engine import Sequence
from megakd.ownership import Taken, owning
from megakd.publish import make_folder, publish_text, publishing, sync_folder

INFO = ".info.json"
SETTINGS = "settings.json"
PART = ".part"
DIGITS = 5  # of a log-probability, behind the point


@dataclasses.dataclass(frozen=True)
class Results:
    """A file of completions, being written or written.

    Attributes:
        path: OUTPUT.
        settings: what its content depends on, as JSON; a launch with others does not go on with it.
        completions: of each prompt.
    """

    path: pathlib.Path
    settings: Mapping
    completions: int

    @property
    def info(self) -> pathlib.Path:
        return self.path.with_name(self.path.name + INFO)

    @property
    def parts(self) -> pathlib.Path:
        return self.path.with_name(self.path.name + ".parts")

    def finished(self) -> bool:
        """Whether all of it is there already.

        Raises:
            ConfigError: there is a file, or the beginning of one, that was made otherwise.
        """
        if self.info.exists() and self.path.exists():
            self._compare(self.info, read(self.info).get("settings", {}))
            return True
        if (self.parts / SETTINGS).exists():
            self._compare(self.parts, read(self.parts / SETTINGS))
        elif self.path.exists():
            raise ConfigError(f"{self.path} exists already", hint="remove it, or name another --output")
        return False

    def _compare(self, where: pathlib.Path, known: Mapping) -> None:
        mine = json.loads(json.dumps(self.settings))
        changed = [key for key in {**known, **mine} if known.get(key) != mine.get(key)]
        if changed:
            lines = "\n".join(f"  {key}: was {known.get(key)}, is {mine.get(key)}" for key in changed)
            raise ConfigError(
                f"{where} was begun with other settings:\n{lines}",
                hint="start the same command again, name another --output, or remove what is there",
            )

    @contextlib.contextmanager
    def writing(self) -> Iterator[np.ndarray]:
        """For rank 0: owns the parts while the block lasts; gives the numbers of what they hold, ascending.

        The number of a completion is prompt * completions + completion.

        Raises:
            ConfigError: another launch owns them, or they cannot be written.
        """
        with contextlib.ExitStack() as stack:
            try:
                make_folder(self.parts)
                stack.enter_context(owning(self.parts / "lock"))
                if not (self.parts / SETTINGS).exists():
                    publish_text(self.parts / SETTINGS, json.dumps(self.settings, indent=1))
                done = np.unique(np.array([number for number, *_ in self._lines()], dtype=np.int64))
            except Taken as owner:
                raise ConfigError(
                    f"{self.parts} is being written by {owner}", hint="wait for it, or name another --output"
                ) from owner
            except OSError as error:
                raise unwritable(self.path, error) from error
            yield done

    def _lines(self) -> Iterator[tuple[int, pathlib.Path, int, int]]:
        """(number, file, place, bytes) of every whole line of every part."""
        for file in sorted(self.parts.glob(f"*{PART}")):
            place = 0
            with file.open("rb") as content:
                for line in content:
                    if line.endswith(b"\n"):
                        with contextlib.suppress(ValueError, LookupError, TypeError):  # damaged: it is written again
                            yield number_of(json.loads(line), self.completions), file, place, len(line)
                    place += len(line)

    def finish(self, counts: Mapping) -> None:
        """For rank 0, when everything is in the parts: puts it together, in order, and removes the parts."""
        lines = {number: where for number, *where in self._lines()}
        try:
            with publishing(self.path) as partial, partial.open("wb") as out, contextlib.ExitStack() as stack:
                opened: dict[pathlib.Path, BinaryIO] = {}
                for number in sorted(lines):
                    file, place, size = lines[number]
                    if file not in opened:
                        opened[file] = stack.enter_context(file.open("rb"))
                    opened[file].seek(place)
                    out.write(opened[file].read(size))
            info = {"settings": self.settings, **counts, "completions": len(lines), "megakd_version": __version__}
            publish_text(self.info, json.dumps(info, indent=1))
            shutil.rmtree(self.parts)
            sync_folder(self.path.parent)
        except OSError as error:
            raise unwritable(self.path, error) from error


class PartWriter:
    """Appends finished completions to a part of this launch's own.

    Args:
        results: whose.
        name: of the model that writes, such as its data-parallel rank.
        fingerprint: of the tokenizer.
    """

    def __init__(self, results: Results, name: str, fingerprint: str):
        self.path = results.parts / f"{name}.{secrets.token_hex(4)}{PART}"
        self.fingerprint = fingerprint

    def __enter__(self) -> "PartWriter":
        self.file = None  # opened with the first line, so that a launch that has nothing to do leaves no part
        return self

    def __exit__(self, *_) -> None:
        if self.file is not None:
            self.file.close()

    def add(self, sequence: Sequence, prompt: str) -> None:
        """One line, handed to the system as a whole: a killed process does not lose it."""
        try:
            if self.file is None:
                self.file = self.path.open("wb")
            self.file.write(line_of(describe(sequence, prompt, self.fingerprint)).encode())
            self.file.flush()
        except OSError as error:
            raise unwritable(self.path, error) from error


def describe(sequence: Sequence, prompt: str, fingerprint: str) -> dict:
    """The line of a finished sequence."""
    return {
        "prompt_number": sequence.request.prompt,
        "completion_number": sequence.request.completion,
        "prompt": prompt,
        "completion": sequence.text,
        "prompt_ids": list(sequence.request.ids),
        "completion_ids": sequence.ids,
        "logprobs": [round(logprob, DIGITS) for logprob in sequence.logprobs],
        "finish_reason": sequence.reason,
        "stop": sequence.stop,
        "tokenizer": fingerprint[:SHOWN_DIGITS],
    }


def line_of(entry: Mapping) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"


def number_of(entry: Mapping, completions: int) -> int:
    return entry["prompt_number"] * completions + entry["completion_number"]


def read(path: pathlib.Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", hint="remove it, or name another --output") from error


def unwritable(path: pathlib.Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{path} cannot be written: {error.strerror or error} ({error.filename or path})",
        hint="free space on that disk, or name another --output; what was finished is kept",
    )
