"""Writing a cache: parts, each a shard, in any order by any rank; whole or not there; resumed after any kill.

A cache is recorded in parts, which are fixed stretches of the samples, so that a part's shard is the same whoever
writes it and however often the recording was interrupted. A shard is published by rename, then its record as
shard-N.json beside it; only a part that has both counts. When all parts are there, one rank writes the index and the
finished `cache.json`.
"""

import contextlib
import dataclasses
import json
import pathlib

from megakd.cache.head import RECORD_FILE, whole_head, write_head_record
from megakd.cache.header import HEADER_FILE, Header, ShardRecord, load_record, read_header, write_header, write_json
from megakd.cache.index import has_index, write_index
from megakd.cache.publish import unwritable
from megakd.cache.shard import ShardWriter, check_head
from megakd.errors import CacheError
from megakd.ownership import Taken, owning
from megakd.publish import INCOMPLETE

LOCK_FILE = "writer.lock"


def shard_file(part: int) -> str:
    return f"shard-{part:08d}.arrow"


def write_record(folder: pathlib.Path, record: ShardRecord) -> None:
    """Publish what makes a shard count while the header does not list it."""
    write_json(folder / record.file.replace(".arrow", ".json"), dataclasses.asdict(record))


@contextlib.contextmanager
def writing(folder, header: Header):
    """Own a folder for writing. One rank enters it; the others write parts between two barriers inside.

    Makes the folder or checks that the recording in it is this one, and marks it unfinished. Two that own one folder,
    where the file system has no locks, write the same parts: the worst is that one stops at a file that is gone.

    Yields:
        The records of the parts that are whole already, by part.
    Raises:
        CacheError: another process writes into it, or it holds another recording; nothing has been changed then.
    """
    folder = pathlib.Path(folder)
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(folder, error) from error
        try:
            stack.enter_context(owning(folder / LOCK_FILE))
        except Taken as holder:
            raise CacheError(
                f"{folder} is being written by another `megakd cache` ({holder})",
                hint="wait for it, or record into another folder and `megakd cache merge` the two",
            ) from None
        except OSError as error:
            raise unwritable(folder / LOCK_FILE, error) from error
        yield _open(folder, header)


def _open(folder: pathlib.Path, header: Header) -> dict[int, ShardRecord]:
    if not (folder / HEADER_FILE).exists():
        if strays := sorted(p.name for p in folder.iterdir() if p.suffix == ".arrow"):
            raise CacheError(
                f"{folder} has no {HEADER_FILE} but holds {strays[0]}" + (" and others" if strays[1:] else ""),
                hint="choose an empty folder",
            )
        write_header(folder, header)
        return {}
    old = read_header(folder)
    check_same(folder, old, header)
    for stray in folder.glob(f"*{INCOMPLETE}"):  # of a writer that was killed
        stray.unlink(missing_ok=True)
    whole = whole_parts(folder, old)
    head = whole_head(folder, old)
    has_head = head is not None or not header.contents.hidden_size
    if not (old.finished and len(whole) == header.parts and has_index(folder, old) and has_head):
        for record in whole.values():
            write_record(folder, record)
        if head:
            write_head_record(folder, head)
        write_header(folder, dataclasses.replace(header, created=old.created))
    return whole


def check_same(folder, old: Header, new: Header) -> None:
    """Raises CacheError, with both values, unless two headers describe one recording."""
    before, after = old.identity(), new.identity()
    changed = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    if changed:
        lines = "".join(f"\n  {key}: was {before.get(key)}, is {after.get(key)}" for key in changed)
        raise CacheError(
            f"{folder} holds another recording:{lines}",
            hint="choose another folder (teacher.cache); two recordings of other samples become one by `cache merge`",
        )


def whole_parts(folder, header: Header) -> dict[int, ShardRecord]:
    """The parts whose shard is there as its record says, those of the header and those published since.

    A record may be of an older shard of the part: a kill can come between the two. The head tells, for it holds the
    checksums of all rows; their payloads are left to the reader and to `megakd cache verify`.
    """
    folder = pathlib.Path(folder)
    records = list(header.shards)
    for path in sorted(folder.glob("shard-*.json")):
        with contextlib.suppress(OSError, ValueError, CacheError):  # half a record: the part is written again
            records.append(load_record(ShardRecord, json.loads(path.read_text(encoding="utf-8")), path))
    whole = {}
    for record in records:
        path = folder / record.file
        with contextlib.suppress(CacheError):
            check_head(path, record)
            whole[record.part] = record
    return whole


def publish_part(folder, part: int, shard: ShardWriter) -> ShardRecord:
    """Publish a part's shard and then its record.

    Raises:
        CacheError: the disk is full or cannot be written; the part is not whole then.
    """
    folder = pathlib.Path(folder)
    record = shard.publish(folder / shard_file(part), part)
    write_record(folder, record)
    return record


def finish(folder, header: Header) -> Header:
    """Write the index and the finished header, when every part is whole, and remove what is no longer needed.

    Raises:
        CacheError: a part is missing, or a shard's head is damaged.
    """
    folder = pathlib.Path(folder)
    old = read_header(folder)
    whole = whole_parts(folder, old)
    missing = [part for part in range(header.parts) if part not in whole]
    if missing:
        raise CacheError(
            f"{folder} lacks {len(missing)} of {header.parts} parts, first part {missing[0]}",
            hint="start the same `megakd cache` again: it records what is missing",
        )
    head = whole_head(folder, old) if header.contents.hidden_size else None
    if header.contents.hidden_size and head is None:
        raise CacheError(
            f"{folder} lacks the teacher's output layer", hint="start the same `megakd cache` again: it records it"
        )
    shards = tuple(whole[part] for part in range(header.parts))
    header = dataclasses.replace(
        header, created=old.created, finished=True, shards=shards, index=write_index(folder, shards), head=head
    )
    write_header(folder, header)
    for path in [*folder.glob("shard-*.json"), folder / RECORD_FILE, *folder.glob(f"*{INCOMPLETE}")]:
        path.unlink(missing_ok=True)
    return header
