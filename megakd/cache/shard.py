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
from megakd.file import File

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
            head_digest = digest_of([content[:head], content[len(content) - foot :]])
            total = len(content)
            del data
        return ShardRecord(
            file=name, part=part, rows=len(self.rows), tokens=sum(row[2] for row in self.rows),
            entries=sum(row[3] for row in self.rows), bytes=total, head_bytes=head, foot_bytes=foot,
            head_digest=head_digest, file_digest=whole,
        )  # fmt: skip


class Shard:
    """A shard opened for reading.

    Keys, sizes, checksums and masks are held in memory; a payload is read when its row is asked for.

    Args:
        folder: of the cache.
        record: the header's.
        check: compare the digest of head and foot; False when it has been done before.
    Raises:
        CacheError: the file is missing, has another size, or its head is damaged; before Arrow sees it.
    """

    def __init__(self, folder, record: ShardRecord, *, check: bool = True):
        self.path, self.record = pathlib.Path(folder) / record.file, record
        self.file = open_shard_file(self.path, record)
        head, foot = check_ends(self.file, record) if check else read_ends(self.file, record)
        content = np.zeros(record.bytes, np.uint8)  # without the payloads, whose pages nobody touches
        content[: len(head)] = np.frombuffer(head, np.uint8)
        content[record.bytes - len(foot) :] = np.frombuffer(foot, np.uint8)
        try:
            batch = pa.ipc.open_file(pa.py_buffer(content)).get_batch(0)
        except pa.ArrowException as error:
            raise damaged(self.path, f"Arrow cannot read it: {error}") from error
        small = ("length", "tokens", "entries", "last_label", "checksum")
        self.numbers = [batch.column(name).to_numpy().copy() for name in small]
        self.keys = np.frombuffer(batch.column("key").buffers()[1], np.uint8)[: 16 * record.rows].reshape(-1, 16).copy()
        self.mask_ends, masks = _binary(batch.column("mask"))
        self.masks = masks.tobytes()
        self.payload_ends, _ = _binary(batch.column("payload"))

    def __len__(self) -> int:
        return self.record.rows

    def row(self, number: int) -> EncodedRow:
        """A row.

        Raises:
            CacheError: its payload cannot be read, or is no longer there.
        """
        length, tokens, entries, last_label, checksum = (int(column[number]) for column in self.numbers)
        mask = self.masks[self.mask_ends[number] : self.mask_ends[number + 1]]
        start, stop = (int(end) for end in self.payload_ends[number : number + 2])
        payload = memoryview(self.file.read(self.record.head_bytes + start, stop - start))
        key = self.keys[number].tobytes()
        return EncodedRow(key, length, tokens, entries, last_label, mask, checksum, payload)


def open_shard_file(path: pathlib.Path, record: ShardRecord) -> File:
    """Raises CacheError unless the file is there and of the size the header says."""
    return File(path, record.bytes, damaged)


def read_ends(file: File, record: ShardRecord) -> tuple[bytes, bytes]:
    """What comes before and after the payloads."""
    return file.read(0, record.head_bytes), file.read(record.bytes - record.foot_bytes, record.foot_bytes)


def check_ends(file: File, record: ShardRecord) -> tuple[bytes, bytes]:
    """As `read_ends`; raises CacheError unless both are what was written."""
    ends = read_ends(file, record)
    seen = digest_of(ends)
    if seen != record.head_digest:
        raise damaged(file.path, f"the digest of its metadata is {seen}, {record.head_digest} was written")
    return ends


def check_head(path: pathlib.Path, record: ShardRecord) -> None:
    """Raises CacheError unless the file is there, of its size, and its metadata are what was written."""
    check_ends(open_shard_file(path, record), record)


def check_file(folder, record: ShardRecord) -> None:
    """Raises CacheError unless every byte of the file is what was written; reads all of it."""
    file = open_shard_file(pathlib.Path(folder) / record.file, record)
    check_ends(file, record)
    if digest_of(file.blocks()) != record.file_digest:
        raise damaged(file.path, "the digest of the file differs: one or more rows are damaged")


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
    """(a copy of the offsets, a view of the bytes) of a large_binary column."""
    _, offsets, data = column.buffers()
    content = np.frombuffer(data, np.uint8) if data is not None and data.size else np.empty(0, np.uint8)
    return np.frombuffer(offsets, np.int64)[: len(column) + 1].copy(), content
