"""A file that is read by position and never mapped.

A mapped file that shrinks, or a disk that fails under it, ends the process with a signal; here both are an error.
"""

import os
import pathlib
import weakref
from collections.abc import Callable, Iterator

from megakd.errors import MegakdError

BLOCK_BYTES = 1 << 24


class File:
    """A file of known size, open for reading from any thread until nobody refers to it.

    Args:
        path, size_bytes: where it is, and how long it was when it was written.
        damaged: makes the error of a path and a reason.
    Raises:
        MegakdError: as `damaged` makes it; it is missing, cannot be read, or has another size.
    """

    def __init__(self, path: pathlib.Path, size_bytes: int, damaged: Callable[[pathlib.Path, str], MegakdError]):
        self.path, self.size_bytes, self.damaged = path, size_bytes, damaged
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise damaged(path, "it is missing") from error
        except OSError as error:
            raise damaged(path, f"it cannot be read: {error}") from error
        weakref.finalize(self, os.close, self.descriptor)
        seen = os.fstat(self.descriptor).st_size
        if seen != size_bytes:
            raise damaged(path, f"it has {seen:,} bytes, {size_bytes:,} were written")

    def read(self, start: int, size: int) -> bytes:
        """`size` bytes from `start` on.

        Raises:
            MegakdError: as `damaged` makes it; they cannot be read, or are no longer there.
        """
        pieces, missing = [], size
        while missing:
            try:
                piece = os.pread(self.descriptor, missing, start + size - missing)
            except OSError as error:
                raise self.damaged(self.path, f"it cannot be read: {error}") from error
            if not piece:
                seen = os.fstat(self.descriptor).st_size
                raise self.damaged(self.path, f"it has {seen:,} bytes now, {self.size_bytes:,} were written")
            pieces.append(piece)
            missing -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def blocks(self) -> Iterator[bytes]:
        """All of it, piece by piece; raises as `read`."""
        for start in range(0, self.size_bytes, BLOCK_BYTES):
            yield self.read(start, min(BLOCK_BYTES, self.size_bytes - start))
