"""`megakd.json`: what a checkpoint folder says of itself, the digests of its files, and one of the record itself.

The files are bound to each other by it: a file of another step, run or layout has other digests than this record lists,
and a record that was changed in any value no longer has the digest that it carries.
"""

import json
import pathlib
from dataclasses import dataclass

from megakd import __version__
from megakd.checkpoints.inside import below
from megakd.digests import (
    ALGORITHM,
    CHUNK_BYTES,
    KIND,
    DamagedFile,
    FileDigests,
    VerifiedFile,
    Verify,
    digest_files,
    sealed,
)
from megakd.errors import CheckpointError, DamagedCheckpointError
from megakd.limits import parse_json
from megakd.publish import publish_text

RECORD = "megakd.json"
FORMAT_VERSION = 2  # 1 had neither digests nor run and layout
DATA = ".distcp"  # what is checked where it is read; every other file is checked with the record


@dataclass(frozen=True)
class Files:
    """The files of a checkpoint, opened so that what is read is what was saved.

    Attributes:
        folder: where they are.
        sizes: bytes of each, by its path in the folder.
        digests: of each; None: there are none, as in format 1 and in a folder that is being written.
        verify: how many of the chunks that are read are compared.
    """

    folder: pathlib.Path
    sizes: dict[str, int]
    digests: dict[str, FileDigests] | None
    verify: Verify = "always"

    def open(self, name: str) -> VerifiedFile:
        """A file for reading.

        Raises:
            DamagedFile: now or when it is read.
            OSError: it cannot be opened.
        """
        if self.digests is not None and name not in self.digests:
            raise DamagedFile(f"{self.folder / name} is not among the files that {RECORD} lists")
        return VerifiedFile(self.folder / name, self.digests and self.digests[name], self.verify)

    def read(self, name: str) -> bytes:
        """All of a small file. Raises as `open`."""
        with self.open(name) as file:
            return file.read()

    def check(self) -> None:
        """Compare the sizes of all files, and the digests of all but the data files.

        Raises:
            DamagedCheckpointError: names the file.
            OSError: a file cannot be read.
        """
        for name, size in self.sizes.items():
            path = self.folder / name
            seen = path.stat().st_size if path.is_file() else None
            if seen != size:
                raise DamagedCheckpointError(
                    f"{path} is {'missing' if seen is None else f'{seen} bytes long'}, {size} bytes were saved",
                    hint="the checkpoint is truncated; copy it again or use an older one",
                )
        for name in self.sizes:
            if not name.endswith(DATA) and self.digests is not None:
                try:
                    self.read(name)
                except DamagedFile as error:
                    raise damaged(error) from error


def damaged(error: DamagedFile) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        str(error), hint="copy the checkpoint again, or use an older one; `megakd check CHECKPOINT` reads all of it"
    )


def unrecorded(folder: pathlib.Path) -> Files:
    """The files of a folder that has no record yet."""
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
    return Files(folder, {name: (folder / name).stat().st_size for name in names}, None)


def describe_files(folder: pathlib.Path, written: dict[str, FileDigests]) -> dict:
    """The part of a record that lists the files of a folder.

    Args:
        written: digests that were made when the files were written, by name; the others are read for theirs.
    """
    names = [name for name in unrecorded(folder).sizes if name != RECORD]
    missing = [name for name in names if name not in written]
    known = written | dict(zip(missing, digest_files(folder / name for name in missing), strict=True))
    files = {name: {"bytes": known[name].size_bytes, "digests": known[name].chunks} for name in names}
    return {"digests": KIND, "files": files}


def write_record(folder: pathlib.Path, record: dict) -> None:
    """Write (or replace) a folder's record, with its digest."""
    publish_text(folder / RECORD, json.dumps(sealed(record), indent=1))


def read_record(folder: pathlib.Path) -> dict:
    """A folder's record as it was written.

    Raises:
        DamagedCheckpointError: it is not what was written.
        CheckpointError: it cannot be read, or is of a version that this megakd does not know.
    """
    path = folder / RECORD
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise unreadable(path, error) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}", hint="check the folder's permissions") from error
    try:
        record = parse_json(content.decode("utf-8"), path, CheckpointError)
        version = record["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise unreadable(path, error) from error
    if not isinstance(version, int) or version < 1:
        raise unreadable(path, f"format_version is {version!r}")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has checkpoint format {version}, this megakd ({__version__}) reads up to {FORMAT_VERSION}",
            hint=f"use megakd {record.get('megakd_version', 'of a later version')}",
        )
    if version >= 2 and record.get("digest") != sealed(record)["digest"]:
        raise unreadable(path, "its values are not those that were saved")
    return record


def check_shape(record: dict) -> None:
    """Raises TypeError or KeyError where a record's values are not of the kinds that are read."""
    text, values = str | None, dict(record)
    kinds = {"model": dict, "step": int, "training": bool, "metrics": dict, "tokenizer": dict | None, "files": dict}
    added = {key: dict | None for key in ("conversion", "pruning", "layout", "data")} | {"run": text}
    kinds |= {key: kind for key, kind in added.items() if key in record}
    if isinstance(record["tokenizer"], dict):
        kinds["tokenizer.fingerprint"] = text
        values["tokenizer.fingerprint"] = record["tokenizer"].get("fingerprint")
    for key, kind in kinds.items():
        if not isinstance(values[key], kind):
            raise TypeError(f"{key} is {str(values[key])[:100]!r}")


def read_files(folder: pathlib.Path, record: dict, verify: Verify) -> Files:
    """The files that a record lists.

    Raises:
        CheckpointError: their digests are of a kind that this megakd does not know.
        ValueError, KeyError, TypeError, AttributeError: it lists none.
    """
    for name in record["files"]:
        below(folder, name, folder / RECORD)
    if record["format_version"] == 1:
        sizes = dict(record["files"])
        if not all(isinstance(size, int) for size in sizes.values()):
            raise TypeError("its files have no sizes")
        return Files(folder, sizes, None, verify)
    kind = record["digests"]
    if kind != KIND:
        raise CheckpointError(
            f"{folder} has digests of the kind {kind}, this megakd ({__version__}) knows {ALGORITHM} of {CHUNK_BYTES}",
            hint=f"use megakd {record.get('megakd_version', 'of a later version')}",
        )
    digests = {name: FileDigests(entry["bytes"], entry["digests"]) for name, entry in record["files"].items()}
    return Files(folder, {name: known.size_bytes for name, known in digests.items()}, digests, verify)


def unreadable(path: pathlib.Path, why) -> DamagedCheckpointError:
    why = f"{type(why).__name__}: {why}" if isinstance(why, Exception) else why
    return DamagedCheckpointError(
        f"{path} cannot be read: {why}", hint="the file was edited or damaged; copy the checkpoint again"
    )
