"""Files that are whole or not there: written under another name, made durable, and renamed."""

import contextlib
import errno
import os
import pathlib
import secrets
from collections.abc import Iterator

from megakd.errors import CacheError

INCOMPLETE = ".incomplete"


@contextlib.contextmanager
def publishing(path) -> Iterator[pathlib.Path]:
    """Gives a path to write a file to; when the block ends, the file is on disk and has the name `path`.

    The path given is this call's alone, so a writer that outlives its launch cannot mix its bytes into the file of the
    one that replaced it.

    Raises:
        CacheError: the disk is full or cannot be written; nothing is left then, and what `path` was before stays.
    """
    path = pathlib.Path(path)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}{INCOMPLETE}")
    try:
        yield partial
        _sync(partial)
        os.replace(partial, path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not every file system can sync a folder
        _sync(path.parent)


def unwritable(path, error: OSError) -> CacheError:
    """The error for a file of a cache that could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CacheError(
            f"{path} could not be written: the disk is full ({os.strerror(error.errno)})",
            hint="free space and give the same command again: what was whole before stays, and is not made again",
        )
    return CacheError(f"{path} could not be written: {error}", hint="choose a folder that can be written")


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
