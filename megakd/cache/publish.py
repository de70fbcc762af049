"""`megakd.publish` for the files of a cache, with failures that name the cache and what to do."""

import contextlib
import errno
import os
import pathlib
from collections.abc import Iterator

from megakd import publish
from megakd.errors import CacheError


@contextlib.contextmanager
def publishing(path) -> Iterator[pathlib.Path]:
    """As `megakd.publish.publishing`.

    Raises:
        CacheError: the disk is full or cannot be written; nothing is left then, and what `path` was before stays.
    """
    try:
        with publish.publishing(path) as partial:
            yield partial
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path, error: OSError) -> CacheError:
    """The error for a file of a cache that could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CacheError(
            f"{path} could not be written: the disk is full ({os.strerror(error.errno)})",
            hint="free space and give the same command again: what was whole before stays, and is not made again",
        )
    return CacheError(f"{path} could not be written: {error}", hint="choose a folder that can be written")
