"""Files by which one process owns what others may want to write too.

Where the file system has locks (flock) they decide: who comes second is refused, or waits, and the system drops the
lock when its holder dies, however it dies. Where it has none (Lustre mounted without, some network file systems) who
comes last owns: a warning says so, its name is in the file, and the one before it learns of it from `check_owner`,
which it calls before it publishes.
"""

import contextlib
import fcntl
import logging
import os
import pathlib
import socket
import weakref
from collections.abc import Iterator
from typing import IO

LOG = logging.getLogger("megakd")


class Taken(Exception):
    """Another process owns the file; the text is its name."""


@contextlib.contextmanager
def owning(path, *, wait: bool = False, remove: bool = False) -> Iterator[None]:
    """Own what a file stands for, until the block ends; the file holds this process's name meanwhile.

    Args:
        path: of the file; its folder exists.
        wait: for another owner to be done; False raises.
        remove: the file, at the end; False leaves it, empty.
    Raises:
        Taken: another process owns it, and `wait` is False; nothing has been changed.
        OSError: the file cannot be written.
    """
    path = pathlib.Path(path)
    with _open_locked(path, wait) as file:
        file.truncate(0)
        file.write(name())
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if path.read_text(encoding="utf-8") == name():  # not that of one that came later
                    os.unlink(path) if remove else file.truncate(0)
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)  # a child just forked may not have come to closing its copy yet


def check_owner(path) -> None:
    """Raises OSError where another process has owned the file since this one began to."""
    path = pathlib.Path(path)
    seen = path.read_text(encoding="utf-8") if path.exists() else name()
    if seen != name():
        raise OSError(f"{path.parent} was taken by another launch ({seen or 'which is done'}); this one writes no more")


def name() -> str:
    """What this process is called in such a file."""
    return f"{socket.gethostname()} pid {os.getpid()} job {os.environ.get('SLURM_JOB_ID', '-')}"


def _open_locked(path: pathlib.Path, wait: bool) -> IO:
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  the caller closes it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            with file:
                file.seek(0)
                raise Taken(file.read().strip() or "no name yet") from None
        except OSError as error:
            LOG.warning(
                "%s: this file system has no locks (%s); see to it that only one launch writes here",
                path.parent, error.strerror,
            )  # fmt: skip
            return file
        if _has_name(file, path):
            _forget_in_children(file)
            return file
        file.close()  # its owner has removed it while this process waited


def _has_name(file: IO, path: pathlib.Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    return False


def _forget_in_children(file: IO) -> None:
    """A child that is forked, and outlives this process, must not hold the lock on."""
    mine = weakref.ref(file)
    os.register_at_fork(after_in_child=lambda: (kept := mine()) and kept.close())
