"""A shard: one Arrow IPC file with one record batch, one row per sample, written once and published by rename.

The payloads are the last column, so that their bytes are one run near the end of the file. Everything before it (the
head: schema, small columns, offsets) and after it (the foot: Arrow's footer) has a digest in the header, which is
compared before Arrow parses anything; payloads have a checksum each. No byte of the file is without one of the two.
"""

import contextlib
import hashlib
import mmap
import pathlib

import numpy as np
import pyarrow as pa

from megakd.cache.header import ShardRecord, digest_of
from megakd.cache.publish import publishing
from megakd.cache.row import EncodedRow
from megakd.errors import CacheError

SCHEMA = pa.schema(
    [
        pa.field("key", pa.binary(16), nullable=False),
        pa.field("length", pa.int32(), nullable=False),
        pa.field("tokens", pa.int32(), nullable=False),
        pa.field("entries", pa.int64(), nullable=False),
        pa.field("last_label", pa.int32(), nullable=False),
        pa.field("checksum", pa.uint32(), nullable=False),
        pa.field("mask", pa.large_binary(), nullable=False),
        pa.field("payload", pa.large_binary(), nullable=False),
    ]
)


class ShardWriter:
    """Collects the rows of one shard and publishes them; holds one shard's bytes in memory."""

    def __init__(self):
        self.rows: list[tuple] = []
        self.payload = bytearray()
        self.ends = [0]

    def add(self, row: EncodedRow) -> None:
        self.rows.append((row.key, row.length, row.tokens, row.entries, row.last_label, row.checksum, row.mask))
        self.payload += row.payload
        self.ends.append(len(self.payload))

    def publish(self, path: pathlib.Path, part: int) -> ShardRecord:
        """Write the file.

        Raises:
            CacheError: the disk is full or cannot be written; nothing is left of the shard.
        """
        with publishing(path) as partial:
            with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
                writer.write_batch(self._batch())
            return self._describe(partial, path.name, part)

    def _batch(self) -> pa.RecordBatch:
        columns = list(zip(*self.rows, strict=True)) if self.rows else [[]] * 7
        arrays = [pa.array(list(column), field.type) for column, field in zip(columns, SCHEMA, strict=False)]
        offsets = pa.py_buffer(np.array(self.ends, np.int64))
        data = [None, offsets, pa.py_buffer(self.payload)]
        arrays.append(pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(self.rows), data))
        return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)

    def _describe(self, partial: pathlib.Path, name: str, part: int) -> ShardRecord:
        """Sizes and digests of the file as it was written."""
        with _mapped(partial) as content:
            data = _payload_buffer(pa.ipc.open_file(pa.py_buffer(content)).get_batch(0))
            head, size = len(content), 0
            if data is not None and data.size:
                head, size = data.address - pa.py_buffer(content).address, len(self.payload)
            foot = len(content) - head - size
            whole = hashlib.blake2b(content, digest_size=16).hexdigest()
            head_digest = digest_of(content[:head], content[len(content) - foot :])
            total = len(content)
            del data
        return ShardRecord(
            file=name, part=part, rows=len(self.rows), tokens=sum(row[2] for row in self.rows),
            entries=sum(row[3] for row in self.rows), bytes=total, head_bytes=head, foot_bytes=foot,
            head_digest=head_digest, file_digest=whole,
        )  # fmt: skip


class Shard:
    """A shard opened for reading through a memory map.

    Args:
        folder: of the cache.
        record: the header's.
        check: compare the digest of head and foot; False when it has been done before.
    Raises:
        CacheError: the file is missing, has another size, or its head is damaged; before Arrow sees it.
    """

    def __init__(self, folder, record: ShardRecord, *, check: bool = True):
        self.path = pathlib.Path(folder) / record.file
        self.record = record
        self.content = np.frombuffer(open_shard_file(self.path, record), np.uint8)
        if check:
            check_head(self.path, record, self.content)
        try:
            batch = pa.ipc.open_file(pa.py_buffer(self.content)).get_batch(0)
        except pa.ArrowException as error:
            raise damaged(self.path, f"Arrow cannot read it: {error}") from error
        small = ("length", "tokens", "entries", "last_label", "checksum")
        self.numbers = [batch.column(name).to_numpy() for name in small]
        self.keys = np.frombuffer(batch.column("key").buffers()[1], np.uint8)[: 16 * record.rows].reshape(-1, 16)
        self.mask_ends, self.masks = _binary(batch.column("mask"))
        self.payload_ends, self.payloads = _binary(batch.column("payload"))

    def __len__(self) -> int:
        return self.record.rows

    def row(self, number: int) -> EncodedRow:
        """A row; its payload is a view of the file."""
        length, tokens, entries, last_label, checksum = (int(column[number]) for column in self.numbers)
        mask = bytes(self.masks[self.mask_ends[number] : self.mask_ends[number + 1]])
        payload = self.payloads[self.payload_ends[number] : self.payload_ends[number + 1]]
        key = self.keys[number].tobytes()
        return EncodedRow(key, length, tokens, entries, last_label, mask, checksum, payload)


def open_shard_file(path: pathlib.Path, record: ShardRecord) -> memoryview:
    """The file as a memory map, of the size the header says."""
    try:
        size = path.stat().st_size
        if size != record.bytes:
            raise damaged(path, f"it has {size:,} bytes, {record.bytes:,} were written")
        with open(path, "rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except FileNotFoundError as error:
        raise damaged(path, "it is missing") from error
    except (OSError, ValueError) as error:
        raise damaged(path, f"it cannot be read: {error}") from error


def check_head(path: pathlib.Path, record: ShardRecord, content) -> None:
    """Raises CacheError unless head and foot are what was written."""
    seen = digest_of(content[: record.head_bytes], content[record.bytes - record.foot_bytes :])
    if seen != record.head_digest:
        raise damaged(path, f"the digest of its metadata is {seen}, {record.head_digest} was written")


def check_file(folder, record: ShardRecord) -> None:
    """Raises CacheError unless every byte of the file is what was written; reads all of it."""
    path = pathlib.Path(folder) / record.file
    content = open_shard_file(path, record)
    check_head(path, record, content)
    if digest_of(content) != record.file_digest:
        raise damaged(path, "the digest of the file differs: one or more rows are damaged")


def damaged(path, reason: str) -> CacheError:
    return CacheError(
        f"shard {path} is damaged: {reason}",
        hint="copy the shard again, or delete it and record its part again with `megakd cache`",
    )


@contextlib.contextmanager
def _mapped(path: pathlib.Path):
    with open(path, "rb") as file:
        yield memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _payload_buffer(batch: pa.RecordBatch):
    return batch.column("payload").buffers()[2]


def _binary(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """(offsets, bytes) of a large_binary column."""
    _, offsets, data = column.buffers()
    content = np.frombuffer(data, np.uint8) if data is not None and data.size else np.empty(0, np.uint8)
    return np.frombuffer(offsets, np.int64)[: len(column) + 1], content
