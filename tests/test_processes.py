"""Helper processes follow their parent: gone when it is killed, out of the way of its group's signals."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from megakd.cli import VERBS, load_target
from megakd.errors import ConfigError, DataError

ROOT = pathlib.Path(__file__).parent.parent
PARENT = """
import multiprocessing, os, signal, sys, time
from megakd.processes import follow_parent

def work(followed):
    if followed:
        follow_parent()
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: None)
    children = [multiprocessing.get_context("spawn").Process(target=work, args=(f,)) for f in (True, False)]
    for child in children:
        child.start()
    time.sleep(600)
"""


def is_running(pid):
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_helper_dies_with_its_parent_and_not_of_the_groups_signals(tmp_path):
    (tmp_path / "parent.py").write_text(textwrap.dedent(PARENT))
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py")],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    pids = [int(parent.stdout.readline()) for _ in range(2)]
    try:
        followers = [pid for pid in pids if os.getsid(pid) == pid]
        (left,) = followers
        (other,) = set(pids) - {left}
        os.killpg(parent.pid, signal.SIGTERM)
        wait_until(lambda: not is_running(other))
        assert is_running(left) and is_running(parent.pid)
        parent.kill()
        wait_until(lambda: not is_running(left))
    finally:
        parent.kill()
        for pid in pids:
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)
        parent.communicate()


@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_a_verb_of_one_process_is_not_started_several_times(name, monkeypatch):
    monkeypatch.setenv(name, "4")
    for verb, arguments in (
        ("convert", ["--from", "a", "--to", "b"]),
        ("prepare", ["text", "--input", "a", "--tokenizer", "t", "--output", "b"]),
    ):
        with pytest.raises(ConfigError, match=rf"{name} is 4, but `megakd {verb}` is one process"):
            load_target(VERBS[verb])(arguments)
    monkeypatch.setenv("SLURM_NTASKS", "8")  # a job's script has them, and is one process
    monkeypatch.setenv(name, "1")
    with pytest.raises(DataError, match="tokenizer t does not exist"):
        load_target(VERBS["prepare"])(["text", "--input", "a", "--tokenizer", "t", "--output", "b"])
