"""Programs that begin with torch and Megatron imported, which takes a process seven seconds.

They are forked from the server of tests/ranks.py, which has done nothing but import. Each has an environment,
arguments, a session and streams of its own, runs what it is given, and ends by itself: only the interpreter's start is
missing. Tests of that, and torchrun, start real ones.
"""

import contextlib
import ctypes
import importlib
import os
import pathlib
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile

from megakd.processes import PR_SET_PDEATHSIG
from tests.ranks import forkserver

ROOT = pathlib.Path(__file__).parents[1]


class Forked:
    """What subprocess.Popen offers, of a forked process whose output is kept in files.

    Args:
        program: a script's path, or the name of a module whose main(arguments) is the program.
        arguments: after the program's name.
        environment: all of it; None: this process's, with one thread.
        together: stderr goes where stdout goes.
    """

    def __init__(self, program, *arguments, environment=None, together=False):
        self.output = tempfile.NamedTemporaryFile(prefix="megakd-forked-")  # noqa: SIM115  lives as long as this
        self.errors = self.output if together else tempfile.NamedTemporaryFile(prefix="megakd-forked-")  # noqa: SIM115
        environment = dict(os.environ) | {"OMP_NUM_THREADS": "1"} if environment is None else environment
        given = (str(program), [str(a) for a in arguments], environment, self.output.name, self.errors.name)
        self.process = forkserver().Process(target=_begin, args=given)
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.process.name, timeout)
        return self.process.exitcode

    def communicate(self, timeout=None):
        self.wait(timeout)
        return tuple(pathlib.Path(file.name).read_text() for file in (self.output, self.errors))

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def run(program, *arguments, timeout=120, **more) -> subprocess.CompletedProcess:
    """As subprocess.run with captured text."""
    process = Forked(program, *arguments, **more)
    try:
        output, errors = process.communicate(timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess([str(program), *map(str, arguments)], process.returncode, output, errors)


def by_hand(ranks, program, *arguments, environment=None, **more) -> list[Forked]:
    """All ranks of one launch without torchrun: rank 0 carries the store."""
    base = dict(os.environ) | {"OMP_NUM_THREADS": "1"} if environment is None else environment
    base = base | {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    base["MASTER_PORT"] = str(free_port())
    numbers = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return [Forked(program, *arguments, environment=base | number, **more) for number in numbers]


def free_port() -> int:
    """One that nobody has, and that the system gives nobody: those that it gives begin at 32768."""
    while True:
        port = random.SystemRandom().randrange(20000, 32768)
        with socket.socket() as meeting, contextlib.suppress(OSError):
            meeting.bind(("127.0.0.1", port))
            return port


def _begin(program, arguments, environment, output, errors):
    os.setsid()
    # The server that it is forked from ends with the tests, by a kill too; a launch must not go on without them.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    for descriptor, path in ((1, output), (2, errors)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
    sys.argv = [program, *arguments]
    if program.endswith(".py"):
        sys.path.insert(0, os.path.dirname(program))
        runpy.run_path(program, run_name="__main__")
    else:
        sys.exit(importlib.import_module(program).main(arguments))
