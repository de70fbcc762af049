"""Helper processes that end with the process that started them, and nothing before it; verbs that are one process."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping

from megakd.errors import ConfigError

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


def check_one_process(verb: str, environ: Mapping[str, str]) -> None:
    """Raises ConfigError where a launcher has started several processes of a verb that is one.

    A job's script that calls it directly has started one, however many tasks the job may have.
    """
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if environ.get(name, "").isdecimal() and int(environ[name]) > 1:
            raise ConfigError(
                f"environment: {name} is {environ[name]}, but `megakd {verb}` is one process: each of these would do "
                "the whole work, into the same place",
                hint=f"start it without torchrun or mpirun; in a Slurm job: srun --ntasks=1 megakd {verb} ...; where a "
                f"container sets {name} for everything in it, unset it",
            )
