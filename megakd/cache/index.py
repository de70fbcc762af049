"""`index.bin`: which shard and row each content key is in; four sorted columns, searched by halving.

    key_high <u8 [n], key_low <u8 [n]   the 16 bytes of a key, as two big-endian numbers
    shard    <u4 [n], row     <u4 [n]   place in the header's list of shards, and in that shard

Sorted by (key_high, key_low, shard, row). A key may stand there more than once: the same ids were recorded with another
mask or another last label, or twice.
"""

import bisect
import pathlib

import numpy as np

from megakd.cache.header import Header, IndexRecord, digest_of
from megakd.cache.publish import publishing
from megakd.cache.shard import Shard
from megakd.errors import CacheError
from megakd.file import File

INDEX_FILE = "index.bin"
_ROW_BYTES = 24


def split_keys(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n, 16] as two uint64 [n], big-endian."""
    high, low = np.ascontiguousarray(keys).view(">u8").astype(np.uint64).T.reshape(2, -1)
    return high, low


def write_index(folder, shards) -> IndexRecord:
    """Index the shards' keys (their heads are checked on the way) and publish the file.

    Args:
        shards: ShardRecords in the header's order.
    """
    keys, shard_n, row_n = [np.empty((0, 16), np.uint8)], [np.empty(0, np.uint32)], [np.empty(0, np.uint32)]
    for number, record in enumerate(shards):
        keys.append(Shard(folder, record).keys.copy())
        shard_n.append(np.full(record.rows, number, np.uint32))
        row_n.append(np.arange(record.rows, dtype=np.uint32))
    high, low = split_keys(np.concatenate(keys))
    shard_n, row_n = np.concatenate(shard_n), np.concatenate(row_n)
    order = np.lexsort((row_n, shard_n, low, high))
    columns = (high.astype("<u8"), low.astype("<u8"), shard_n.astype("<u4"), row_n.astype("<u4"))
    content = b"".join(column[order].tobytes() for column in columns)
    with publishing(pathlib.Path(folder) / INDEX_FILE) as partial:
        partial.write_bytes(content)
    return IndexRecord(rows=len(order), digest=digest_of([content]))


def has_index(folder, header: Header) -> bool:
    """Whether the index of a finished cache is there, as it was written."""
    try:
        Index(folder, header)
    except CacheError:
        return False
    return True


class Index:
    """The index of a finished cache, opened for look-ups.

    Raises:
        CacheError: it is missing or damaged.
    """

    def __init__(self, folder, header: Header):
        rows = header.index.rows
        file = File(pathlib.Path(folder) / INDEX_FILE, _ROW_BYTES * rows, _damaged)
        if digest_of(file.blocks()) != header.index.digest:
            raise _damaged(file.path, f"its bytes are not those that were written for {rows:,} rows")
        self.high, self.low = Column(file, 0, 8, rows), Column(file, 8 * rows, 8, rows)
        self.shard, self.row = Column(file, 16 * rows, 4, rows), Column(file, 20 * rows, 4, rows)

    def __len__(self) -> int:
        return len(self.high)

    def find(self, key: bytes) -> list[tuple[int, int]]:
        """(shard, row) of every row with this key; [] when there is none."""
        high, low = int.from_bytes(key[:8], "big"), int.from_bytes(key[8:], "big")
        found = []
        for at in range(bisect.bisect_left(self.high, high), len(self)):
            if self.high[at] != high:
                break
            if self.low[at] == low:
                found.append((self.shard[at], self.row[at]))
        return found

    def duplicates(self) -> int:
        """Rows whose key another row has too, beyond the first."""
        high, low = self.high.read(), self.low.read()
        return int(((high[1:] == high[:-1]) & (low[1:] == low[:-1])).sum())


class Column:
    """One column of the file: numbers of `width` bytes, each read when it is asked for."""

    def __init__(self, file: File, start: int, width: int, rows: int):
        self.file, self.start, self.width, self.rows = file, start, width, rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, at: int) -> int:
        return int.from_bytes(self.file.read(self.start + self.width * at, self.width), "little")

    def read(self) -> np.ndarray:
        """All of it."""
        return np.frombuffer(self.file.read(self.start, self.width * self.rows), f"<u{self.width}")


def _damaged(path, reason: str) -> CacheError:
    return CacheError(
        f"the key index {path} is missing or damaged: {reason}",
        hint="copy it again, or rebuild it: the command that made the cache does, and so does `megakd cache merge "
        "--output NEW OLD`",
    )
