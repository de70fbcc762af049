"""Digests of a file's chunks: made while the file is written, compared while it is read.

A file is cut every CHUNK_BYTES; each chunk has its own 128-bit XXH3, so that a reader of a part of a large file checks
that part and no more. XXH3 finds damage and mix-ups at the speed of memory; whoever can change a file on purpose can
change its digests too, and no hash of this kind is a defence against that.
"""

import io
import json
import os
import pathlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import BinaryIO, Literal

import xxhash

ALGORITHM = "xxh3_128"
CHUNK_BYTES = 4 << 20
DIGEST_BYTES = 16
PIECE_BYTES = 256 << 10  # hashed while it is still in the processor's cache
SAMPLED = 16  # of so many chunks one is compared, and the first and the last of a file
READERS = 8
KEPT = 4
KIND = {"algorithm": ALGORITHM, "chunk_bytes": CHUNK_BYTES}  # as records name it

Verify = Literal["always", "sampled", "never"]


class DamagedFile(OSError):
    """A file does not hold what was written to it."""


@dataclass(frozen=True)
class FileDigests:
    """What a file held when it was written.

    Attributes:
        size_bytes: its length.
        chunks: the digests of its chunks in a row, in hexadecimal.
    """

    size_bytes: int
    chunks: str

    def __post_init__(self):
        if len(self.chunks) != 2 * DIGEST_BYTES * self.count:
            raise ValueError(f"{self.size_bytes} bytes have {self.count} digests, got {len(self.chunks)} digits")

    @property
    def count(self) -> int:
        return -(-self.size_bytes // CHUNK_BYTES)

    def of(self, number: int) -> bytes:
        return bytes.fromhex(self.chunks[2 * DIGEST_BYTES * number :][: 2 * DIGEST_BYTES])


class Digester:
    """The chunk digests of bytes that come in order, in pieces of any size."""

    def __init__(self):
        self.size_bytes, self._chunks, self._hash = 0, [], xxhash.xxh3_128()

    def update(self, data) -> None:
        view = memoryview(data).cast("B")
        while len(view):
            left = CHUNK_BYTES - self.size_bytes % CHUNK_BYTES
            self._hash.update(view[:left])
            self.size_bytes += min(left, len(view))
            if self.size_bytes % CHUNK_BYTES == 0:
                self._chunks.append(self._hash.hexdigest())
                self._hash.reset()
            view = view[left:]

    def digests(self) -> FileDigests:
        last = [self._hash.hexdigest()] if self.size_bytes % CHUNK_BYTES else []
        return FileDigests(self.size_bytes, "".join([*self._chunks, *last]))


@dataclass
class DigestingFile:
    """A new file that is written from its start to its end.

    Attributes:
        digester: has the digests of what was written so far.
    """

    path: pathlib.Path
    digester: Digester = field(default_factory=Digester)

    def __post_init__(self):
        self._file = open(self.path, "wb")  # noqa: SIM115  closed in close()

    def write(self, data) -> int:
        count = self._file.write(data)
        self.digester.update(data)
        return count

    def tell(self) -> int:
        return self.digester.size_bytes

    def flush(self) -> None:
        self._file.flush()

    def sync(self) -> None:
        """Return when all of it is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc) -> None:
        self.close()


class VerifiedFile(io.RawIOBase):
    """A file opened for reading; every byte it gives is from a chunk whose digest was compared.

    Chunks that are read whole go straight to the reader's memory. The last KEPT that were read in parts are kept, for
    an archive is read here and there: its directory at the end, its members.

    Args:
        digests: what was written; None: nothing is compared.
        verify: `sampled` compares one chunk of SAMPLED, and the first and the last of the file.
    """

    def __init__(self, path, digests: FileDigests | None, verify: Verify = "always"):
        super().__init__()
        self.path, self.digests = path, None if verify == "never" else digests
        self.verify, self.position = verify, 0
        self._file: BinaryIO = open(path, "rb", buffering=0)  # noqa: SIM115  closed in close()
        self.size_bytes = os.fstat(self._file.fileno()).st_size
        self._kept: dict[int, memoryview] = {}
        if digests is not None and self.size_bytes != digests.size_bytes:
            self.close()
            raise DamagedFile(f"{path} is {self.size_bytes} bytes long, {digests.size_bytes} bytes were saved")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size_bytes}[whence]
        return self.position

    def readinto(self, buffer) -> int:
        """As of a file, but for less than was asked for only at the end.

        Raises:
            DamagedFile: a chunk is not what was written.
        """
        view = memoryview(buffer).cast("B")[: max(0, self.size_bytes - self.position)]
        wanted = len(view)
        while len(view):
            number, inside = divmod(self.position, CHUNK_BYTES)
            length = min(CHUNK_BYTES, self.size_bytes - number * CHUNK_BYTES)
            taken = min(length - inside, len(view))
            if taken == length and number not in self._kept:
                self._read_chunk(number, view[:length])
            else:
                view[:taken] = self._chunk(number, length)[inside : inside + taken]
            self.position += taken
            view = view[taken:]
        return wanted

    def close(self) -> None:
        self._file.close()
        super().close()

    def _chunk(self, number: int, length: int) -> memoryview:
        if number not in self._kept:
            chunk = memoryview(bytearray(length))
            self._read_chunk(number, chunk)
            while len(self._kept) >= KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[number] = chunk
        return self._kept[number]

    def _read_chunk(self, number: int, into: memoryview) -> None:
        start, compared, digest = number * CHUNK_BYTES, self._is_compared(number), xxhash.xxh3_128()
        self._file.seek(start)
        done = 0
        while done < len(into):
            count = self._file.readinto(into[done : done + PIECE_BYTES])
            if not count:
                raise DamagedFile(f"{self.path} ends at byte {start + done}, while it is read")
            if compared:
                digest.update(into[done : done + count])
            done += count
        if compared and digest.digest() != self.digests.of(number):
            raise DamagedFile(f"{self.path} is damaged between the bytes {start} and {start + len(into)}")

    def _is_compared(self, number: int) -> bool:
        if self.digests is None:
            return False
        return self.verify == "always" or number % SAMPLED == 0 or number == self.digests.count - 1


def digest_file(path) -> FileDigests:
    """The digests of a file as it is."""
    digester, piece = Digester(), bytearray(PIECE_BYTES)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(piece):
            digester.update(memoryview(piece)[:count])
    return digester.digests()


def digest_files(paths: Iterable[pathlib.Path]) -> list[FileDigests]:
    """The digests of files as they are, of several at a time."""
    with ThreadPoolExecutor(READERS, "megakd-digest") as threads:
        return list(threads.map(digest_file, paths))


def digest_of(data: bytes) -> str:
    """The digest of a short text or record."""
    return xxhash.xxh3_128_hexdigest(data)


def sealed(record: dict) -> dict:
    """A record (plain values) with the digest of its other values as `digest`."""
    values = {key: value for key, value in record.items() if key != "digest"}
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return values | {"digest": digest_of(text.encode())}
