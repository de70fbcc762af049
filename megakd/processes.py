"""Helper processes that end with the process that started them, and nothing before it."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def follow_parent() -> None:
    """Make this process, a helper of another one, die with it and with nothing else. A worker calls it first.

    It gets a session of its own, which the signals of a terminal or of torchrun do not reach: its parent decides. The
    kernel kills it when the thread that started it ends, by SIGKILL too (Linux; elsewhere it outlives that).
    """
    started_by = multiprocessing.parent_process()  # known even if it died while this process was still starting
    parent = os.getppid() if started_by is None else started_by.pid
    with contextlib.suppress(OSError):  # it may lead one already
        os.setsid()
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before the kernel knew
            os._exit(1)
