"""What a run folder says of its run, read without the models, the config schema or torch.

A folder of an older megakd, of a run that is still going on, or of one that was killed while it wrote, is read as far
as it goes; what could not be read is said in `Run.notes`.
"""

import dataclasses
import json
import pathlib
import shlex
from collections.abc import Iterable

import yaml

from megakd.errors import ReportError
from megakd.reporting.lines import MOST_NAMED, NO_LINES, Lines, by_kind, parse_lines
from megakd.stopped import STOP_FILE

METRICS_FILE, CONFIG_FILE = "metrics.jsonl", "config.yaml"
EVALUATIONS_FILE, VERSIONS_FILE = "evaluations.jsonl", "versions.txt"


@dataclasses.dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        folder: as it was named.
        name: short, and no other run's in the report.
        lines: kind (`train`, `validation`, `data`, ...) to its lines.
        validations: the lines of validations as they stand in the file, bins of calibration among them.
        evaluations: lines of `megakd evaluate`, the last one last.
        config: dotted key to its text; empty where the config cannot be read.
        versions: package to its version.
        stopped: (step, whether it was the last one) of the run's end; None where it has not ended by itself.
        notes: what the reader of the page has to know about the folder.
    """

    folder: pathlib.Path
    name: str
    lines: dict[str, Lines]
    validations: list[dict]
    evaluations: list[dict]
    config: dict[str, str]
    versions: dict[str, str]
    stopped: tuple[int, bool] | None
    notes: list[str]

    def of(self, kind: str) -> Lines:
        """The lines of a kind, which may be none."""
        return self.lines.get(kind, NO_LINES)


def read_runs(folders: Iterable[pathlib.Path]) -> list[Run]:
    """The runs of some folders; a folder that is named twice is read once, and its notes say so.

    Raises:
        ReportError: a folder is no run's.
    """
    given: dict[pathlib.Path, list[pathlib.Path]] = {}
    for folder in folders:
        given.setdefault(folder.resolve(), []).append(folder)
    names = unique_names(list(given))
    return [
        read_run(same[0], name, [f"named {len(same)} times, shown once"] if len(same) > 1 else [])
        for same, name in zip(given.values(), names, strict=True)
    ]


def read_run(folder: pathlib.Path, name: str, notes: list[str]) -> Run:
    """One run; `notes` are those that are known before."""
    try:
        metrics = (folder / METRICS_FILE).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise no_run(folder) from error
    except OSError as error:
        raise ReportError(
            f"{folder / METRICS_FILE} cannot be read: {error.strerror}", hint="check its permissions"
        ) from error
    notes = list(notes)
    entries = parse_lines(metrics, METRICS_FILE, notes)
    lines = by_kind(entries, METRICS_FILE, notes)
    if not lines.keys() & {"train", "validation"}:
        notes.append(f"{METRICS_FILE} has no step yet")
    return Run(
        folder=folder,
        name=name,
        lines=lines,
        validations=[entry for entry in entries if entry.get("kind") == "validation"],
        evaluations=parse_lines(read_optional(folder / EVALUATIONS_FILE, notes), EVALUATIONS_FILE, notes),
        config=read_config(folder / CONFIG_FILE, notes),
        versions=dict(
            line.split(" ", 1)
            for line in read_optional(folder / VERSIONS_FILE, notes).decode("utf-8", "replace").splitlines()
            if " " in line
        ),
        stopped=read_stop(folder / STOP_FILE, notes),
        notes=notes,
    )


def no_run(folder: pathlib.Path) -> ReportError:
    """The error for a folder that is no run's, with the runs that are near it."""
    if not folder.exists():
        return ReportError(f"{folder} does not exist", hint="name the run.dir of a run")
    if not folder.is_dir():
        return ReportError(f"{folder} is a file", hint=f"name the run's folder: {folder.parent}")
    below = sorted(str(path.parent) for path in folder.glob(f"*/{METRICS_FILE}"))
    hint = "name the run.dir of a run; it has been started when the file is there"
    if below:
        hint = "its folders are runs: megakd report " + " ".join(map(shlex.quote, below[:MOST_NAMED]))
        hint += " ..." if len(below) > MOST_NAMED else ""
    return ReportError(f"{folder} is no run: it holds no {METRICS_FILE}", hint=hint)


def unique_names(folders: list[pathlib.Path]) -> list[str]:
    """For each folder as few of its last parts as tell it from the others."""

    def tail(folder: pathlib.Path, parts: int) -> str:
        return str(pathlib.Path(*folder.parts[-parts:]))

    deepest = max((len(folder.parts) for folder in folders), default=1)
    names = []
    for folder in folders:
        others = [other for other in folders if other != folder]
        parts = next(
            (n for n in range(1, deepest) if all(tail(folder, n) != tail(other, n) for other in others)), deepest
        )
        names.append(tail(folder, parts))
    return names


def read_optional(path: pathlib.Path, notes: list[str]) -> bytes:
    """A file that a run need not have; empty without."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror}")
        return b""


def read_config(path: pathlib.Path, notes: list[str]) -> dict[str, str]:
    """Every dotted key of a resolved config with its text.

    The text and not the value: one writer wrote all of them, so equal values have equal texts, and neither the schema
    of this version nor its import is needed.
    """
    content = read_optional(path, notes)
    try:
        values = yaml.load(content.decode("utf-8"), yaml.BaseLoader)
    except (yaml.YAMLError, ValueError):
        notes.append(f"{path.name} is not valid YAML: no settings are shown")
        return {}
    if not isinstance(values, dict):
        notes.append(f"{path.name} is missing or empty: no settings are shown")
        return {}
    return flatten(values)


def flatten(values: dict, prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return flat


def read_stop(path: pathlib.Path, notes: list[str]) -> tuple[int, bool] | None:
    content = read_optional(path, notes)
    if not content:
        return None
    try:
        values = json.loads(content)
        return int(values["step"]), bool(values["finished"])
    except (ValueError, KeyError, TypeError):
        notes.append(f"{path.name} cannot be read")
        return None
