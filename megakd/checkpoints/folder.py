"""The checkpoint folder: a Megatron torch_dist folder, `megakd.json` that describes it, and the tokenizer's files.

A folder is written under `NAME.incomplete` and renamed when everything, `megakd.json` last, is on disk. The record
(megakd.checkpoints.record) lists every file with its size and digests; sizes and small files are compared when it is
read, data files where they are read. `run_id.txt` in a run folder and the step in the record say where it belongs.
"""

import dataclasses
import itertools
import logging
import os
import pathlib
import re
import shutil
from collections.abc import Callable

from megakd import __version__
from megakd.checkpoints.inside import check_folder, plain_name
from megakd.checkpoints.record import (
    FORMAT_VERSION,
    RECORD,
    Files,
    check_shape,
    describe_files,
    read_files,
    read_record,
    unreadable,
    write_record,
)
from megakd.config import Model
from megakd.digests import FileDigests, Verify
from megakd.errors import CheckpointError, ConfigError
from megakd.publish import INCOMPLETE, REPLACED, make_folder, publish_written, settled, sync_folder
from megakd.publish import settle as settle_folder

LOG = logging.getLogger("megakd")
KEPT = "hf"  # folder inside, of a checkpoint that came from Hugging Face: what is needed to write the same files again
RUN_ID_FILE = "run_id.txt"
DAMAGED = ".damaged"
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
        files: opens its files and compares what is read with what was saved.
        conversion: what `megakd convert` made it from and how that was verified; None for one that was trained.
        run: identity of the run that saved it; None if no run did, or an older megakd.
        layout: its ranks, {"tp", "pp", "dp"}; None likewise.
        data: how samples were made and in which order they came; None likewise.
    """

    path: pathlib.Path
    model: Model
    step: int
    tokenizer_file: str | None
    tokenizer_fingerprint: str | None
    training: bool
    metrics: dict
    files: Files
    conversion: dict | None = None
    run: str | None = None
    layout: dict[str, int] | None = None
    data: dict | None = None

    @property
    def tokenizer_path(self) -> pathlib.Path | None:
        return self.path / self.tokenizer_file if self.tokenizer_file else None


def step_folder(run_dir, step: int) -> pathlib.Path:
    return pathlib.Path(run_dir) / "checkpoints" / f"step_{step:08d}"


def incomplete(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + INCOMPLETE)


def whole_checkpoints(run_dir) -> list[pathlib.Path]:
    """The published checkpoints of a run folder, oldest first; one whose replacement was cut short is among them."""
    return [path for path in step_folders(run_dir) if (path / RECORD).is_file()]


def step_folders(run_dir) -> list[pathlib.Path]:
    """As whole_checkpoints, and folders that have the name of one and lack its record."""
    found = (pathlib.Path(run_dir) / "checkpoints").glob("step_*")
    names = {path.with_name(path.name.removesuffix(REPLACED)) for path in found}
    return [settled(path) for path in sorted(names) if STEP_FOLDER.match(path.name)]


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


def read_checkpoint(path, verify: Verify = "always") -> Checkpoint:
    """Read and check a folder's record, the sizes of its files and the content of the small ones; no weights are read.

    Args:
        verify: how much of what is read, now and later, is compared with its digests.
    Raises:
        DamagedCheckpointError: the record or a file is not what was saved.
        CheckpointError: missing, of a newer format, in a place where it does not belong, or with names or links that
            lead out of the folder.
    """
    path = last_checkpoint(path)
    check_folder(path)
    record = read_record(path)
    try:
        check_shape(record)
        tokenizer = record["tokenizer"] or {}
        checkpoint = Checkpoint(
            path=path,
            model=Model.model_validate(record["model"]),
            step=record["step"],
            tokenizer_file=plain_name(tokenizer["file"], path / RECORD) if tokenizer else None,
            tokenizer_fingerprint=tokenizer.get("fingerprint"),
            training=record["training"],
            metrics=record["metrics"],
            files=read_files(path, record, verify),
            conversion=record.get("conversion"),
            run=record.get("run"),
            layout=record.get("layout"),
            data=record.get("data"),
        )
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise unreadable(path / RECORD, error) from error
    try:
        checkpoint.files.check()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}", hint="check the folder's permissions") from error
    check_place(checkpoint)
    if checkpoint.files.digests is None:
        LOG.warning("%s was saved without digests by an older megakd: damage to it cannot be seen", path)
    return checkpoint


def tokenizer_path(path) -> pathlib.Path:
    """The tokenizer file of a checkpoint or a run folder, whatever its name; any other path as it is.

    Raises:
        CheckpointError: as `read_checkpoint`, or the checkpoint carries none.
    """
    path = pathlib.Path(path)
    if not (path / RECORD).is_file() and not (path / "checkpoints").is_dir():
        return path
    checkpoint = read_checkpoint(path)
    if checkpoint.tokenizer_path is None:
        raise CheckpointError(f"{checkpoint.path} carries no tokenizer", hint="name a tokenizer file")
    return checkpoint.tokenizer_path


def check_place(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError when a folder has the name of another step, or lies among the checkpoints of another run.

    Anywhere else, and under any other name, a checkpoint may be copied or moved.
    """
    path, named = checkpoint.path, STEP_FOLDER.match(checkpoint.path.name.removesuffix(REPLACED))
    if named and int(named[1]) != checkpoint.step:
        raise CheckpointError(
            f"{path} holds step {checkpoint.step}: it was renamed",
            hint=f"call it {step_folder('.', checkpoint.step).name}, or move it out of the run folder",
        )
    run_dir = path.parent.parent
    here = run_id(run_dir) if named and path.parent.name == "checkpoints" else None
    if None not in (here, checkpoint.run) and here != checkpoint.run:
        raise CheckpointError(
            f"{path} was saved by run {checkpoint.run}, {run_dir} is run {here}: it was copied there",
            hint="move it out of the run folder; student.checkpoint starts a run from a checkpoint of another one",
        )


def run_id(run_dir: pathlib.Path) -> str | None:
    """The identity of the run in a folder; None if it has none yet."""
    try:
        return (run_dir / RUN_ID_FILE).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None


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
    pruning: dict | None = None,
    origin: pathlib.Path | None = None,
    data: dict | None = None,
    run: str | None = None,
    layout: dict[str, int] | None = None,
    written: dict[str, FileDigests] | None = None,
) -> None:
    """Complete the folder that `begin` made and give it its name. One rank calls it, after all have written.

    Args:
        tokenizer: megakd.data Tokenizer whose files travel along, or None.
        conversion: see Checkpoint.
        pruning: what `megakd prune` cut it out of, what it kept, and why.
        data: how samples were made of records (templates, masks), for whoever uses the model, and in which `order`
            (a version) they came.
        origin: checkpoint that training started from; what it has kept of its Hugging Face origin goes along.
        run, layout: see Checkpoint.
        written: digests that were made when the files were written, by name; other files are read for theirs.
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
        "run": run,
        "layout": layout,
        "model": model.model_dump(),
        "tokenizer": tokenizer_record,
        "metrics": metrics,
        "conversion": conversion,
        "pruning": pruning,
        "data": data,
    }
    write_record(source, record | describe_files(source, written or {}))
    publish_written(source, path)  # over one that is there: a run that went back to an older one saves this step anew


def discard(path: pathlib.Path) -> None:
    """Remove what a failed save left. One rank calls it."""
    shutil.rmtree(incomplete(path), ignore_errors=True)


def prune(run_dir, keep_last: int, keep: Callable[[int], bool]) -> None:
    """Remove all but the last `keep_last` checkpoints of a run and those whose step `keep` names. One rank calls it.

    What cannot be removed (another process reads it) is left with a warning, and tried again next time.
    """
    whole = whole_checkpoints(run_dir)
    for folder in whole[:-keep_last]:
        if not keep(int(STEP_FOLDER.match(folder.name)[1])):
            remove(folder)
    for trash in (pathlib.Path(run_dir) / "checkpoints").glob("*.incomplete"):  # what a kill has left
        if whole and trash.name < whole[-1].name:
            shutil.rmtree(trash, ignore_errors=True)


def set_aside(path: pathlib.Path) -> pathlib.Path:
    """Give a damaged checkpoint a name under which it is no checkpoint any more; returns where it is now."""
    names = (path.with_name(f"{path.name}{DAMAGED}{number or ''}") for number in itertools.count())
    target = next(name for name in names if not os.path.lexists(name))
    os.rename(path, target)
    sync_folder(path.parent)
    return target


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
    write_record(path, read_record(path) | {"metrics": metrics})
