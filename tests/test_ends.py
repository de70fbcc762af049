"""How launches end that are stopped early, lose a process, or stand still; and what ranks must have alike."""

import json
import os
import pathlib
import signal
import subprocess
import time

import pytest

from megakd.ranks import Ranks
from megakd.ranks.agreement import differences
from megakd.ranks.peers import Peers, is_stopped
from megakd.ranks.pulse import Pulse
from megakd.ranks.stuck import blame, record_flight
from tests import forked
from tests.forked import free_port
from tests.test_launch import TORCHRUN, environment, finish, script, start_by_hand  # noqa: F401

GONE_SECONDS = 60


def start_torchrun(ranks, path):
    return forked.Forked(*TORCHRUN, ranks, path, environment=environment())


def pids(folder, ranks, seconds=120):
    """The ranks' process ids, which the script under test writes into files."""
    deadline = time.monotonic() + seconds
    files = [folder / f"pid_{rank}" for rank in range(ranks)]
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.05)
    return [int(file.read_text()) for file in files]


def wait_until_gone(processes, seconds=GONE_SECONDS):
    deadline = time.monotonic() + seconds
    while left := [pid for pid in processes if pathlib.Path(f"/proc/{pid}").exists()]:
        if time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"still there after {seconds} s: {left}")
        time.sleep(0.1)


NOTE_PID = """
def note_pid(rank):
    here = os.path.dirname(os.path.abspath(__file__))
    with open(f"{here}/pid_{rank}.new", "w") as file:
        file.write(str(os.getpid()))
    os.rename(file.name, f"{here}/pid_{rank}")
    return here
"""


def test_one_rank_asked_to_stop_while_all_are_busy_ends_the_launch(script, tmp_path):  # noqa: F811
    path = script(
        NOTE_PID
        + """
with Ranks("cpu") as ranks:
    ranks.on_early_stop(lambda: open(os.path.dirname(__file__) + "/noted", "a").write(f"{ranks.rank}\\n"))
    dist.barrier()
    note_pid(ranks.rank)
    if ranks.rank == 0:
        time.sleep(600)
    dist.all_reduce(torch.ones(3))  # rank 1 waits where Python's handlers do not run
"""
    )
    process = start_torchrun(2, path)
    ranks = pids(tmp_path, 2)
    os.kill(ranks[1], signal.SIGUSR1)
    code, _, err = finish(process)
    wait_until_gone(ranks)
    assert code == 0, err
    assert (tmp_path / "noted").read_text() == "0\n"
    assert "rank 1 was asked to stop by SIGUSR1 before the first step" in err


def test_ranks_whose_launcher_is_killed_agree_to_stop(script, tmp_path):  # noqa: F811
    path = script(
        NOTE_PID
        + """
with Ranks("cpu") as ranks:
    stop = ranks.agree_to_stop()
    here = note_pid(ranks.rank)
    while not stop:
        time.sleep(0.1)
        stop = ranks.agree_to_stop()
    open(f"{here}/agreed_{ranks.rank}", "w").close()
"""
    )
    process = start_torchrun(2, path)
    ranks = pids(tmp_path, 2)
    process.kill()
    wait_until_gone(ranks)
    process.communicate(timeout=10)
    assert (tmp_path / "agreed_0").exists() and (tmp_path / "agreed_1").exists()


STANDS_STILL = (
    NOTE_PID
    + """
with Ranks("cpu", watchdog_seconds=10, reports=os.path.dirname(__file__)) as ranks:
    ranks.agree_to_stop()
    for step in range(1, 4):
        ranks.pulse.mark("step", step)
        dist.barrier()
    note_pid(ranks.rank)
    if ranks.rank == 1:
        STAND_STILL
    ranks.pulse.mark("step", 4)
    dist.barrier()
"""
)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["time.sleep(600)", "os.kill(os.getpid(), signal.SIGSTOP)"])
def test_a_rank_that_stands_still_is_named_and_ends_the_launch(how, script, tmp_path):  # noqa: F811
    path, port = script(STANDS_STILL.replace("STAND_STILL", how)), free_port()
    first, second = start_by_hand(path, 0, port), start_by_hand(path, 1, port)
    try:
        code, _, err = finish(first)
        assert code == 1
        assert err.startswith("rank 0 stopped: rank 1 is stuck: "), err
        assert f"rank 1 (process {second.pid}" in err and ("stopped by SIGSTOP" in err) == ("SIGSTOP" in how)
        assert "in collective" not in err and f"stacks of all threads: {tmp_path}/stuck" in err
        stacks = (tmp_path / "stuck" / "rank_00000.txt").read_text()
        assert "step" in stacks.splitlines()[0] and "barrier" in stacks
        assert (tmp_path / "stuck" / "rank_00001.txt").exists() == ("sleep" in how)
        assert '"phase": ' in (tmp_path / "heartbeat.json").read_text()
        if "sleep" in how:
            second.wait(GONE_SECONDS)
    finally:
        second.kill()
        second.communicate()


def test_a_store_that_says_nothing_ends_the_others(script):  # noqa: F811
    """Nothing breaks the connection when a network is cut, or, as here, who carries the store is stopped."""
    body = """
    from megakd.ranks import failure
    failure.LOST_STORE_SECONDS = 5.0
    with Ranks("cpu") as ranks:
        ranks.agree_to_stop()
        if ranks.rank == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.barrier()
    """
    path, port = script(body), free_port()
    first, second = start_by_hand(path, 0, port), start_by_hand(path, 1, port)
    try:
        code, _, err = finish(second)
        assert code == 1
        assert err.startswith(f"rank 1 stopped: nothing comes from the store at 127.0.0.1:{port} any more"), err
    finally:
        first.kill()
        first.communicate()


def test_ranks_that_were_started_differently_are_told_apart(script):  # noqa: F811
    path, port = (
        script("""
    from megakd.cli import print_error
    with Ranks("cpu", facts={"optimizer.lr": os.environ["RANK"] + "e-3", "equal": 1}) as ranks:
        print("built")
    """),
        free_port(),
    )
    first, second = start_by_hand(path, 0, port), start_by_hand(path, 1, port)
    (code_0, out_0, err_0), (code_1, out_1, err_1) = finish(first), finish(second)
    assert (code_0, code_1, out_0, out_1) == (1, 1, "", "")
    said = "ConfigError: the ranks were not started alike: optimizer.lr: 0e-3 on rank 0, 1e-3 on rank 1"
    assert err_0.count(said) == err_1.count(said) == 1 and (err_0 + err_1).count("hint: ") == 1
    assert "equal" not in err_0 + err_1


def test_differences_name_key_and_ranks():
    facts = [{"a": 1, "b": 2}, {"a": 1, "b": 3}, {"a": 1, "b": 2}, {"b": 2}]
    assert differences(facts) == [
        "a: 1 on ranks 0-2, missing on rank 3",
        "b: 2 on ranks 0, 2-3, 3 on rank 1",
    ]
    assert differences(facts[:1] * 5) == []


def test_limits_follow_the_longest_phase_and_sleep_does_not_count(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("megakd.ranks.pulse.time.monotonic", lambda: now[0])
    pulse, tight = Pulse(), Pulse(7.0)
    assert pulse.limit_seconds is None, "nobody knows how long preparing takes"
    for seconds in (100.0, 40.0, 1.0):
        for one in (pulse, tight):
            one.mark("step", 1)
        assert (pulse.limit_seconds is None) == (seconds == 100.0), "nor a first step, which compiles"
        now[0] += seconds
    assert pulse.limit_seconds == 500.0 and tight.limit_seconds == 7.0
    pulse.mark("save", 1)
    assert pulse.limit_seconds is None
    for _ in range(3):
        pulse.turn(2.0)
    assert pulse.still_seconds == 4.0, "the first turn after a mark sees it"


def test_who_is_blamed():
    def state(marks, waits):
        return {"marks": marks, "waits": waits, "phase": "step", "step": 5, "still_seconds": 130.0}

    peers = Peers(0, {rank: {"host": "n1", "pid": 100 + rank, "kernel": f"k{rank}"} for rank in range(3)})
    assert blame({0: state(9, True), 2: state(9, True)}, peers, 3, "why")[0] == 1, "the one that does not answer"
    assert blame({0: state(9, True), 1: state(9, True), 2: state(8, True)}, peers, 3, "why")[0] == 2, "the one behind"
    rank, text = blame({0: state(9, True), 1: state(9, False), 2: state(9, True)}, peers, 3, "why")
    assert rank == 1 and text == "why; the others wait for rank 1 (process 101 on n1) in step of step 5 for 130 s"
    rank, text = blame({rank: state(9, True) for rank in range(3)}, peers, 3, "why")
    assert rank == -1 and "none can be blamed" in text


def test_the_heartbeat_says_that_a_launch_has_ended(monkeypatch, tmp_path):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with Ranks("cpu", reports=str(tmp_path)) as ranks:
        ranks.agree_to_stop()
        ranks.pulse.mark("step", 7)
    said = json.loads((tmp_path / "heartbeat.json").read_text())
    assert (said["phase"], said["step"], said["pid"], said["rank"]) == ("end", 7, os.getpid(), 0)
    assert abs(said["time"] - time.time()) < 60


def test_nccl_is_told_where_its_flight_record_goes(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "environ", {"TORCH_NCCL_DUMP_ON_TIMEOUT": "0"})
    record_flight(tmp_path)
    files = [value for name, value in os.environ.items() if name.endswith("TEMP_FILE")]
    assert files == [f"{tmp_path}/stuck/nccl_"] and (tmp_path / "stuck").is_dir()
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "0", "what the user has set stays"


def test_a_stopped_process_is_seen():
    process = subprocess.Popen(["sleep", "60"])
    try:
        assert not is_stopped(process.pid)
        process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 60
        while not is_stopped(process.pid):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
