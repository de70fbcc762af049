"""`index.bin`: which shard and row each content key is in; four sorted columns, mapped and searched by halving.

    key_high <u8 [n], key_low <u8 [n]   the 16 bytes of a key, as two big-endian numbers
    shard    <u4 [n], row     <u4 [n]   place in the header's list of shards, and in that shard

Sorted by (key_high, key_low, shard, row). A key may stand there more than once: the same ids were recorded with another
mask or another last label, or twice.
"""

import itertools
import pathlib

import numpy as np

from megakd.cache.header import Header, IndexRecord, digest_of
from megakd.cache.publish import publishing
from megakd.cache.shard import Shard
from megakd.errors import CacheError

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
    return IndexRecord(rows=len(order), digest=digest_of(content))


class Index:
    """The index of a finished cache, opened for look-ups.

    Raises:
        CacheError: it is missing or damaged.
    """

    def __init__(self, folder, header: Header):
        path, rows = pathlib.Path(folder) / INDEX_FILE, header.index.rows
        try:
            content = np.memmap(path, np.uint8, mode="r") if rows else np.empty(0, np.uint8)
        except (OSError, ValueError) as error:
            raise _damaged(path, str(error)) from error
        if content.size != _ROW_BYTES * rows or digest_of(content) != header.index.digest:
            raise _damaged(path, f"its {content.size:,} bytes are not those that were written for {rows:,} rows")
        ends = np.array([0, 8, 16, 20, 24]) * rows
        pieces = [content[a:b] for a, b in itertools.pairwise(ends)]
        self.high, self.low = pieces[0].view("<u8"), pieces[1].view("<u8")
        self.shard, self.row = pieces[2].view("<u4"), pieces[3].view("<u4")

    def __len__(self) -> int:
        return len(self.high)

    def find(self, key: bytes) -> list[tuple[int, int]]:
        """(shard, row) of every row with this key; [] when there is none."""
        high, low = int.from_bytes(key[:8], "big"), int.from_bytes(key[8:], "big")
        at = int(np.searchsorted(self.high, np.uint64(high)))
        found = []
        while at < len(self.high) and self.high[at] == high:
            if self.low[at] == low:
                found.append((int(self.shard[at]), int(self.row[at])))
            at += 1
        return found

    def duplicates(self) -> int:
        """Rows whose key another row has too, beyond the first."""
        return int(((self.high[1:] == self.high[:-1]) & (self.low[1:] == self.low[:-1])).sum())


def _damaged(path, reason: str) -> CacheError:
    return CacheError(
        f"the key index {path} is missing or damaged: {reason}",
        hint="copy it again, or rebuild it: `megakd cache merge --output NEW OLD`",
    )
