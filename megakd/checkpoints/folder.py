"""The checkpoint folder: a Megatron torch_dist folder, `megakd.json` that describes it, and the tokenizer's files.

A folder is written under `NAME.incomplete` and renamed when everything, `megakd.json` last, is on disk. The record
lists every file with its size, so that a truncated copy is refused before it is read.
"""

import dataclasses
import json
import logging
import os
import pathlib
import re
import shutil

from megakd import __version__
from megakd.checkpoints.inside import below, check_folder, plain_name
from megakd.config import Model
from megakd.errors import CheckpointError, ConfigError
from megakd.limits import read_json
from megakd.publish import INCOMPLETE, REPLACED, make_folder, publish_text, publish_written, settled, sync_folder
from megakd.publish import settle as settle_folder

LOG = logging.getLogger("megakd")
RECORD = "megakd.json"
KEPT = "hf"  # folder inside, of a checkpoint that came from Hugging Face: what is needed to write the same files again
FORMAT_VERSION = 1
STEP_FOLDER = re.compile(r"step_(\d{8})$")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder says of itself.

    Attributes:
        path: the folder.
        model: the model section; `model.vocab_size` is the real vocabulary.
        step: optimizer steps taken.
        tokenizer: file name inside the folder (None: there was none), and its fingerprint.
        training: whether optimizer, schedule and random states are in it, so that a run can continue from it.
        metrics: the validation metrics it was saved with.
        conversion: what `megakd convert` made it from and how that was verified; None for one that was trained.
    """

    path: pathlib.Path
    model: Model
    step: int
    tokenizer_file: str | None
    tokenizer_fingerprint: str | None
    training: bool
    metrics: dict
    conversion: dict | None = None

    @property
    def tokenizer_path(self) -> pathlib.Path | None:
        return self.path / self.tokenizer_file if self.tokenizer_file else None


def step_folder(run_dir, step: int) -> pathlib.Path:
    return pathlib.Path(run_dir) / "checkpoints" / f"step_{step:08d}"


def incomplete(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + INCOMPLETE)


def whole_checkpoints(run_dir) -> list[pathlib.Path]:
    """The published checkpoints of a run folder, oldest first; one whose replacement was cut short is among them."""
    found = (pathlib.Path(run_dir) / "checkpoints").glob("step_*")
    names = {f.with_name(f.name.removesuffix(REPLACED)) for f in found}
    return [settled(f) for f in sorted(names) if STEP_FOLDER.match(f.name) and (settled(f) / RECORD).is_file()]


def settle(run_dir) -> None:
    """Put right what a kill has left half replaced among a run's checkpoints; for the owner of the run folder."""
    for old in (pathlib.Path(run_dir) / "checkpoints").glob(f"step_*{REPLACED}"):
        settle_folder(old.with_name(old.name.removesuffix(REPLACED)))


def last_checkpoint(path) -> pathlib.Path:
    """A checkpoint folder as it is; of a run folder, its last whole one.

    Raises:
        CheckpointError: there is none.
    """
    path = settled(pathlib.Path(path))
    if (path / RECORD).is_file():
        return path
    if not path.is_dir():
        state = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(f"checkpoint {path} {state}", hint="give a checkpoint, run or Hugging Face folder")
    found = whole_checkpoints(path)
    if not found:
        broken = [f.name for f in (path / "checkpoints").glob("*.incomplete")]
        seen = f"only an interrupted save: {', '.join(broken)}" if broken else f"no {RECORD} and no checkpoints/step_*"
        raise CheckpointError(
            f"{path} holds no whole checkpoint ({seen})",
            hint="give a folder that `megakd train` has saved, or its run folder",
        )
    return found[-1]


def read_checkpoint(path) -> Checkpoint:
    """Read and check a folder's record; no weights are read.

    Raises:
        CheckpointError: missing, unreadable, of a newer format, files missing or of another size than recorded, or
            names or links that lead out of the folder.
    """
    path = last_checkpoint(path)
    check_folder(path)
    try:
        record = read_json(path / RECORD, CheckpointError)
        version = record["format_version"]
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has checkpoint format {version}, this megakd ({__version__}) reads up to {FORMAT_VERSION}",
                hint=f"use megakd {record.get('megakd_version', 'of a later version')}",
            )
        tokenizer = record["tokenizer"] or {}
        checkpoint = Checkpoint(
            path=path,
            model=Model.model_validate(record["model"]),
            step=record["step"],
            tokenizer_file=plain_name(tokenizer["file"], path / RECORD) if tokenizer else None,
            tokenizer_fingerprint=tokenizer.get("fingerprint"),
            training=record["training"],
            metrics=record["metrics"],
            conversion=record.get("conversion"),
        )
        files = {name: (below(path, name, path / RECORD), size) for name, size in record["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise CheckpointError(
            f"{path / RECORD} cannot be read: {type(error).__name__}: {error}",
            hint="the file was edited or damaged; copy the checkpoint again",
        ) from error
    for file, size in files.values():
        seen = file.stat().st_size if file.is_file() else None
        if seen != size:
            raise CheckpointError(
                f"{file} is {'missing' if seen is None else f'{seen} bytes long'}, {size} bytes were saved",
                hint="the checkpoint is truncated; copy it again or use an older one",
            )
    return checkpoint


def begin(path: pathlib.Path) -> pathlib.Path:
    """Make the empty folder that a save writes into, over the remains of an interrupted one. One rank calls it."""
    target = incomplete(path)
    shutil.rmtree(target, ignore_errors=True)
    make_folder(target)
    return target


def publish(
    path: pathlib.Path,
    *,
    model: Model,
    step: int,
    tokenizer,
    training: bool,
    metrics: dict,
    conversion: dict | None = None,
    origin: pathlib.Path | None = None,
    data: dict | None = None,
) -> None:
    """Complete the folder that `begin` made and give it its name. One rank calls it, after all have written.

    Args:
        tokenizer: megakd.data Tokenizer whose files travel along, or None.
        conversion: see Checkpoint.
        data: how samples were made of records (templates, masks), for whoever uses the model.
        origin: checkpoint that training started from; what it has kept of its Hugging Face origin goes along.
    """
    source = incomplete(path)
    if origin is not None and (origin / KEPT).is_dir():
        shutil.copytree(origin / KEPT, source / KEPT)
    tokenizer_record = None
    if tokenizer is not None:
        for file in tokenizer.files:
            shutil.copyfile(file, source / pathlib.Path(file).name)
        main_file = pathlib.Path(tokenizer.files[0]).name
        tokenizer_record = {"kind": tokenizer.kind, "file": main_file, "fingerprint": tokenizer.fingerprint}
    record = {
        "format_version": FORMAT_VERSION,
        "megakd_version": __version__,
        "step": step,
        "training": training,
        "model": model.model_dump(),
        "tokenizer": tokenizer_record,
        "metrics": metrics,
        "conversion": conversion,
        "data": data,
        "files": {str(f.relative_to(source)): f.stat().st_size for f in sorted(source.rglob("*")) if f.is_file()},
    }
    (source / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
    publish_written(source, path)  # over one that is there: a run that went back to an older one saves this step anew


def discard(path: pathlib.Path) -> None:
    """Remove what a failed save left. One rank calls it."""
    shutil.rmtree(incomplete(path), ignore_errors=True)


def prune(run_dir, keep_last: int, keep: set[int]) -> None:
    """Remove all but the last `keep_last` checkpoints of a run and those of the steps in `keep`. One rank calls it.

    What cannot be removed (another process reads it) is left with a warning, and tried again next time.
    """
    whole = whole_checkpoints(run_dir)
    for folder in whole[:-keep_last]:
        if int(STEP_FOLDER.match(folder.name)[1]) not in keep:
            remove(folder)
    for trash in (pathlib.Path(run_dir) / "checkpoints").glob("*.incomplete"):  # what a kill has left
        if whole and trash.name < whole[-1].name:
            shutil.rmtree(trash, ignore_errors=True)


def remove(folder: pathlib.Path) -> None:
    trash = incomplete(folder)  # renamed first: never a half-deleted "whole" one
    try:
        shutil.rmtree(trash, ignore_errors=True)
        os.rename(folder, trash)
        sync_folder(folder.parent)
        shutil.rmtree(trash)
    except OSError as error:
        LOG.warning("old checkpoint %s could not be removed: %s", folder, error)


def record_metrics(path: pathlib.Path, metrics: dict) -> None:
    """Add metrics that were measured after a checkpoint was published to its record. One rank calls it."""
    record = json.loads((path / RECORD).read_text(encoding="utf-8"))
    publish_text(path / RECORD, json.dumps(record | {"metrics": metrics}, indent=1))
