"""`head.bin`: the teacher's output layer, which a cache of hidden states holds once; [V, H] in rows, nothing else.

Sizes: V real ids, H channels.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Iterable

import torch
from torch import Tensor

from megakd.cache.header import Header, HeadRecord, load_record, write_json
from megakd.cache.hidden import CODECS, from_bytes, raw_bytes
from megakd.cache.publish import publishing
from megakd.digests import DamagedFile, DigestingFile, FileDigests, VerifiedFile
from megakd.errors import CacheError

HEAD_FILE = "head.bin"
RECORD_FILE = "head.json"  # beside it while the header does not list it


def publish_head(folder, blocks: Iterable[Tensor], header: Header, softcap: float | None) -> HeadRecord:
    """Publish the file, and then its record.

    Args:
        blocks: rows of the weight on the CPU, in order, in bfloat16 or float32; together V of them.
        header: of the cache.
        softcap: of the teacher's logits.
    Raises:
        CacheError: the disk is full or cannot be written; nothing is left of it.
    """
    folder, rows, dtype = pathlib.Path(folder), 0, None
    with publishing(folder / HEAD_FILE) as partial, DigestingFile(partial) as file:
        for block_BH in blocks:
            rows, dtype = rows + len(block_BH), block_BH.dtype
            file.write(raw_bytes(block_BH))
        file.sync()
    contents, digests = header.contents, file.digester.digests()
    if rows != contents.vocab_size:
        raise ValueError(f"an output layer of {rows} rows for {contents.vocab_size} ids")
    record = HeadRecord(
        file=HEAD_FILE, bytes=digests.size_bytes, chunks=digests.chunks, dtype=name_of(dtype), rows=rows,
        hidden_size=contents.hidden_size, softcap=softcap, teacher_fingerprint=header.teacher_fingerprint,
    )  # fmt: skip
    write_head_record(folder, record)
    return record


def write_head_record(folder, record: HeadRecord) -> None:
    """Publish what makes the file count while the header does not list it."""
    write_json(pathlib.Path(folder) / RECORD_FILE, dataclasses.asdict(record))


def whole_head(folder, header: Header) -> HeadRecord | None:
    """The record of an output layer that is there, of the size it was written in; of the header or published since."""
    folder, records = pathlib.Path(folder), [header.head] if header.head else []
    path = folder / RECORD_FILE
    with contextlib.suppress(OSError, ValueError, CacheError):  # half a record, or none: it is written again
        records.append(load_record(HeadRecord, json.loads(path.read_text(encoding="utf-8")), path))
    for record in reversed(records):
        if record.teacher_fingerprint == header.teacher_fingerprint and fits(folder, record):
            return record
    return None


def fits(folder: pathlib.Path, record: HeadRecord) -> bool:
    try:
        with open_head(folder, record):
            return True
    except CacheError:
        return False


def check_head_fits(folder, header: Header) -> None:
    """Raises CacheError unless the header's output layer is there, of the teacher whose hidden states it lists."""
    contents, record = header.contents, header.head
    if record is None:
        raise CacheError(f"{folder} lists no output layer", hint="start the same `megakd cache` again: it records it")
    if record.teacher_fingerprint != header.teacher_fingerprint:
        raise CacheError(
            f"{folder} holds the output layer of teacher {record.teacher_fingerprint[:12]}, and hidden states of "
            f"teacher {header.teacher_fingerprint[:12]}",
            hint="copy the whole folder again, or record it again; its files are not to be exchanged",
        )
    if (record.rows, record.hidden_size) != (contents.vocab_size, contents.hidden_size):
        raise CacheError(
            f"{folder} holds an output layer of {record.rows} ids and {record.hidden_size} channels, for hidden states "
            f"of {contents.hidden_size} channels and {contents.vocab_size} ids",
            hint="copy the whole folder again, or record it again",
        )
    open_head(folder, record).close()


def read_head(folder, record: HeadRecord, start: int, stop: int) -> Tensor:
    """Rows `start` to `stop` of the weight, on the CPU; every byte is compared with its chunk's digest.

    Raises:
        CacheError: the file is missing or damaged.
    """
    row_bytes = record.hidden_size * CODECS[record.dtype].itemsize
    content = bytearray(max(stop - start, 0) * row_bytes)
    with open_head(folder, record) as file:
        file.seek(start * row_bytes)
        try:
            file.readinto(content)
        except OSError as error:
            raise damaged(folder, record, error) from error
    return from_bytes(content, CODECS[record.dtype]).view(-1, record.hidden_size)


def check_head_file(folder, record: HeadRecord) -> None:
    """Raises CacheError unless every byte of the file is what was written; reads all of it."""
    piece = bytearray(4 << 20)
    with open_head(folder, record) as file:
        try:
            while file.readinto(piece):
                pass
        except OSError as error:
            raise damaged(folder, record, error) from error


def add_head(output, source, record: HeadRecord) -> None:
    """Publish a copy or a link of an output layer in another folder, after a check of all of it."""
    check_head_file(source, record)
    with publishing(pathlib.Path(output) / record.file) as partial:
        link_or_copy(pathlib.Path(source) / record.file, partial)
    write_head_record(output, record)


def link_or_copy(source: pathlib.Path, target: pathlib.Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def open_head(folder, record: HeadRecord) -> VerifiedFile:
    try:
        return VerifiedFile(pathlib.Path(folder) / record.file, FileDigests(record.bytes, record.chunks))
    except (OSError, ValueError) as error:
        raise damaged(folder, record, error) from error


def damaged(folder, record: HeadRecord, error: Exception) -> CacheError:
    path = pathlib.Path(folder) / record.file
    reason = str(error) if isinstance(error, DamagedFile) else f"{path}: {error}"
    return CacheError(
        f"the teacher's output layer in {folder} is damaged: {reason}",
        hint=f"copy {path} again, or delete it and start the same `megakd cache` again",
    )


def name_of(dtype: torch.dtype) -> str:
    return next(name for name, known in CODECS.items() if known == dtype)
