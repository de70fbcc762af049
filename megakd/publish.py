"""Files and folders that are whole or not there: written under another name, made durable, and renamed.

What a reader finds under a name is the old content or the new one, at every moment and after a power cut: the new
content is on the disk before it gets the name, and the folder that holds the name is on the disk before the old content
is removed.
"""

import contextlib
import ctypes
import errno
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Iterator

INCOMPLETE = ".incomplete"
REPLACED = ".replaced"  # what a folder is called while the one that takes its place gets its name
LEFT_OVER = re.compile(rf".+\.[0-9a-f]{{8}}{re.escape(INCOMPLETE)}")
_EXCHANGE = 2  # RENAME_EXCHANGE of <linux/fs.h>
_AT_FDCWD = -100


@contextlib.contextmanager
def publishing(path) -> Iterator[pathlib.Path]:
    """Gives a path to write a file to; when the block ends, the file is on disk and has the name `path`.

    The path given is this call's alone, so a writer that outlives its launch cannot mix its bytes into the file of the
    one that replaced it. If the block or the disk fails, nothing is left of it and what `path` was before stays.

    Raises:
        OSError: the file cannot be written.
    """
    path = pathlib.Path(path)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}{INCOMPLETE}")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def publish_text(path, text: str) -> None:
    """Write a text file, in UTF-8, as `publishing` does."""
    with publishing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def publish_written(source: pathlib.Path, path: pathlib.Path) -> None:
    """Give a folder (or a file) that has been written its name; what had that name before is removed.

    Where the file system cannot exchange two names (some network file systems), a kill between two renames leaves the
    old content under `replaced(path)`, whole; `settled` finds it there and `settle` puts it back.

    Args:
        source: beside `path`; all of it is written through to the disk first.
    Raises:
        OSError: it cannot be written or renamed; what `path` was before stays.
    """
    sync_tree(source)
    if os.path.lexists(path) and not exchange(source, path):
        remove(replaced(path))
        os.rename(path, replaced(path))
        os.rename(source, path)
    elif not os.path.lexists(path):
        os.rename(source, path)
    sync_folder(path.parent)
    for old in (source, replaced(path)):
        remove(old)


def replaced(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + REPLACED)


def settled(path: pathlib.Path) -> pathlib.Path:
    """Where the content of `path` is: there, or under the name that a kill in `publish_written` has left it."""
    return replaced(path) if not os.path.lexists(path) and replaced(path).exists() else path


def settle(path: pathlib.Path) -> None:
    """Put right what a kill in `publish_written` has left; for the one process that may write there."""
    old = replaced(path)
    if not old.exists():
        return
    if os.path.lexists(path):
        remove(old)
    else:
        os.rename(old, path)
        sync_folder(path.parent)


def make_folder(path: pathlib.Path) -> None:
    """Make a folder and those above it that are missing, and make their names durable; one that is there is kept.

    Raises:
        OSError: a folder cannot be made, or there is a file of that name.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.is_dir()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)


def sweep(folder: pathlib.Path) -> None:
    """Remove what killed calls of `publishing` have left in a folder; for the one process that may write there."""
    with contextlib.suppress(OSError):
        for stray in folder.iterdir():
            if LEFT_OVER.fullmatch(stray.name):
                remove(stray)


def remove(path: pathlib.Path) -> None:
    """Remove a file or a folder with all that is in it; nothing happens if it is not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path) -> None:
    """Return when the content of a file is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path) -> None:
    """Return when the names in a folder are on the disk, on file systems that can tell."""
    try:
        sync(path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES):
            raise


def sync_tree(path: pathlib.Path) -> None:
    """Return when a file, or a folder with all that is in it, is on the disk; links are not followed."""
    if not path.is_dir():
        return sync(path)
    for folder, _, files in os.walk(path, topdown=False):
        for name in files:
            if not os.path.islink(os.path.join(folder, name)):
                sync(os.path.join(folder, name))
        sync_folder(folder)


def exchange(a: pathlib.Path, b: pathlib.Path) -> bool:
    """Swap two names in one step; False, with nothing changed, where the system or the file system cannot.

    Raises:
        OSError: it can, but not these.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), ctypes.c_uint(_EXCHANGE)) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(a), None, str(b))
