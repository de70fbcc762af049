"""How a launch of ranks begins and ends: real torchrun on gloo, and processes started by hand."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import textwrap

import pytest
import torch.distributed as dist

from megakd.errors import ConfigError
from megakd.ranks import Ranks, read_launch, resolve_device
from tests import forked
from tests.forked import free_port

ROOT = pathlib.Path(__file__).parent.parent
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node"]
PREAMBLE = """
import os, pathlib, signal, sys, time, torch, torch.distributed as dist
from megakd.errors import TrainingError
from megakd.ranks import Ranks
"""


def environment(**more):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    inherited = {name: value for name, value in os.environ.items() if name not in names}  # conftest drops Slurm's
    return inherited | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


@pytest.fixture
def script(tmp_path):
    def write(body):
        (tmp_path / "script.py").write_text(PREAMBLE + textwrap.dedent(body))
        return str(tmp_path / "script.py")

    return write


def torchrun(ranks, path):
    return forked.run(*TORCHRUN, ranks, path, environment=environment())


def start_by_hand(path, rank, port):
    variables = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    numbers = {name: str(value) for name, value in variables.items()}
    return forked.Forked(path, environment=environment(MASTER_ADDR="127.0.0.1", **numbers))


def finish(process):
    try:
        out, err = process.communicate(timeout=90)
    finally:
        process.kill()
    return process.returncode, out, err


def test_one_rank_fails_and_all_are_gone(script):
    path = script("""
        with Ranks("cpu") as ranks:
            dist.barrier()
            if ranks.rank == 1:
                raise TrainingError("loss is nan at step 3", hint="lower it")
            if ranks.rank == 2:
                time.sleep(600)
            dist.all_reduce(torch.ones(3))
    """)
    result = torchrun(3, path)
    assert result.returncode != 0  # long before rank 2 is awake or a collective gives up: `run` waits 120 s
    assert result.stderr.count("TrainingError: loss is nan at step 3\nhint: lower it\n") == 1
    for rank in (0, 2):
        line = f"rank {rank} stopped: rank 1 failed with TrainingError: loss is nan at step 3\n"
        assert result.stderr.count(line) == 1, result.stderr
    assert "Connection closed by peer" not in result.stderr


def test_a_killed_peer(script):
    path, port = (
        script("""
        with Ranks("cpu", rendezvous_seconds=30) as ranks:
            if ranks.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            dist.all_reduce(torch.ones(3))
    """),
        free_port(),
    )
    left, killed = start_by_hand(path, 0, port), start_by_hand(path, 1, port)
    (code, _, err), (code_killed, _, _) = finish(left), finish(killed)
    assert (code, code_killed) == (1, -signal.SIGKILL)
    host = socket.gethostname()
    assert err == (
        f"rank 0 stopped: rank 1 was killed: process {killed.pid} on {host} is gone without a word (out of memory?)\n"
    )


def test_sigterm_is_agreed_on_and_leaving_is_clean(script):
    path = script("""
        with Ranks("cpu") as ranks:
            assert not ranks.agree_to_stop()
            if ranks.rank == 1:
                for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGINT):
                    os.kill(os.getpid(), number)
            os.write(1, f"{ranks.rank} {ranks.stop_requested()} {ranks.agree_to_stop()}\\n".encode())
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    """)
    result = torchrun(2, path)
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == ["0 False True", "1 True True"]


def test_without_torchrun_rank_0_carries_the_store_and_a_bug_keeps_its_traceback(script):
    path, port = (
        script("""
        with Ranks("cpu", rendezvous_seconds=30) as ranks:
            if ranks.rank == 0:
                raise ZeroDivisionError("a bug")
            time.sleep(600)
    """),
        free_port(),
    )
    first, second = start_by_hand(path, 0, port), start_by_hand(path, 1, port)
    (code_0, _, err_0), (code_1, _, err_1) = finish(first), finish(second)
    assert (code_0, code_1) == (1, 1)
    assert err_0.startswith("rank 0 failed\nTraceback") and "ZeroDivisionError: a bug" in err_0
    assert err_1 == "rank 1 stopped: rank 0 failed with ZeroDivisionError: a bug\n"


def test_rank_0_leaves_last_when_it_carries_the_store(script):
    path, port = (
        script("""
        with Ranks("cpu", rendezvous_seconds=30) as ranks:
            time.sleep(2.5 * ranks.rank)
            pathlib.Path(f"{sys.argv[0]}.{ranks.rank}").touch()
        print(pathlib.Path(f"{sys.argv[0]}.1").exists())
    """),
        free_port(),
    )
    first, second = start_by_hand(path, 0, port), start_by_hand(path, 1, port)
    (code_0, said, _), (code_1, _, err_1) = finish(first), finish(second)
    assert (code_0, code_1, err_1) == (0, 0, "")
    assert said == "True\n", "rank 0 left before rank 1 came to the end of its block"


def test_missing_peer_nobody_there_and_port_in_use(script):
    path = script("""
        from megakd.cli import print_error
        from megakd.errors import MegakdError
        try:
            with Ranks("cpu", rendezvous_seconds=3):
                pass
        except MegakdError as error:
            print_error(error)
            sys.exit(1)
    """)
    port = free_port()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        busy = taken.getsockname()[1]
        processes = [start_by_hand(path, 0, port), start_by_hand(path, 1, free_port()), start_by_hand(path, 0, busy)]
        (code_0, _, alone), (code_1, _, nobody), (code_2, _, in_use) = [finish(process) for process in processes]
    assert (code_0, code_1, code_2) == (1, 1, 1)
    assert f"rank 0 waited 3 s at 127.0.0.1:{port} for all 2 ranks; missing: rank 1\nhint: " in alone
    assert "rank 1: MegakdError: rank 1 of 2 reached nothing at 127.0.0.1:" in nobody and "within 3 s" in nobody
    assert f"MegakdError: rank 0 cannot listen on 127.0.0.1:{busy}: the port is in use\nhint: " in in_use
    assert "Traceback" not in alone + nobody + in_use


def test_alone_without_a_launcher(monkeypatch, request):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where pytest runs in the background
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, ours))
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Ranks("cpu") as ranks:
        os.kill(os.getpid(), signal.SIGINT)  # nobody has asked whether to stop
    with pytest.raises(KeyboardInterrupt), Ranks("cpu") as ranks:
        assert not ranks.agree_to_stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert ranks.agree_to_stop()
        os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Ranks("cpu") as ranks:
        ranks.agree_to_stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert not ranks.agree_to_stop() and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(ZeroDivisionError), Ranks("cpu") as ranks:
        assert (ranks.rank, ranks.world_size, ranks.is_main, ranks.device.type) == (0, 1, True, "cpu")
        assert dist.get_backend() == "gloo" and not ranks.agree_to_stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert ranks.agree_to_stop()
        raise ZeroDivisionError
    assert not dist.is_initialized()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_what_the_environment_says():
    full = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
    launch = read_launch(full)
    assert (launch.rank, launch.world_size, launch.local_rank, launch.where) == (3, 4, 1, "n1:29500")
    assert not launch.hosts_store and read_launch(full | {"RANK": "0"}).hosts_store
    assert not read_launch(full | {"RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}).hosts_store
    assert read_launch(full | {"TORCHELASTIC_RESTART_COUNT": "2"}).attempt == 2
    torchrun = full | {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "1", "GROUP_WORLD_SIZE": "2"}
    prefixes = {read_launch(torchrun | {"TORCHELASTIC_RESTART_COUNT": count}).prefix for count in "01"}
    assert len(prefixes) == 1, "one agent may have counted a restart that another has not"
    lasting = torchrun | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert read_launch(lasting).prefix != read_launch(lasting | {"TORCHELASTIC_RESTART_COUNT": "2"}).prefix
    refused = lasting | {"TORCHELASTIC_MAX_RESTARTS": "3"}
    with pytest.raises(
        ConfigError, match=r"ranks of 2 nodes 3 times.*\nhint: export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
    ):
        read_launch(refused)
    assert read_launch(refused | {"GROUP_WORLD_SIZE": "1"}).attempt == 1
    assert read_launch(refused | {"TORCHELASTIC_USE_AGENT_STORE": "False"}).attempt == 1
    assert read_launch({}).world_size == 1 and read_launch({"WORLD_SIZE": "1"}).world_size == 1
    with pytest.raises(ConfigError, match=r"RANK 3 is outside 0\.\.0 \(WORLD_SIZE is missing\)\nhint: .*torchrun"):
        read_launch({"RANK": "3"})
    for wrong, said in (
        ({"RANK": "4"}, r"RANK 4 is outside 0..3"),
        ({"RANK": "x"}, r"RANK is 'x', expected a number"),
    ):
        with pytest.raises(ConfigError, match=said):
            read_launch(full | wrong)
    with pytest.raises(ConfigError, match="MASTER_PORT is missing"):
        read_launch({name: value for name, value in full.items() if name != "MASTER_PORT"})


def test_devices(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match=r"run.device is cuda, but torch .* sees no GPU"):
        resolve_device("cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert resolve_device("auto") == "cuda"
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"rank 1 is local rank 1, but torch sees 1 GPU"):
        Ranks("auto")


def test_a_batch_script_without_srun_is_refused_with_the_command_that_works(script, tmp_path):
    path = script("""
        with Ranks("cpu") as ranks:
            sys.stdout.write(f"rank {ranks.rank} of {ranks.world_size} was told {sys.argv[1]}\\n")  # one write each
    """)
    tasks = {"SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}  # of a batch script
    alone = forked.run(path, "a word", environment=environment(**tasks))
    assert alone.returncode == 1 and "was told" not in alone.stdout
    assert "SLURM_NTASKS is 2, but WORLD_SIZE and RANK are missing" in alone.stderr
    hint = alone.stderr.splitlines()[-1].strip()
    assert hint.startswith("srun --nodes=1 --ntasks=1 --ntasks-per-node=1 torchrun ")
    srun = tmp_path / "srun"  # one task, as the options say, on this machine
    srun.write_text('#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nSLURM_STEP_NUM_TASKS=1 exec "$@"\n')
    srun.chmod(0o755)
    paths = os.pathsep.join([str(tmp_path), os.path.dirname(sys.executable), os.environ["PATH"]])
    started = subprocess.run(
        ["bash", "-c", hint], env=environment(**tasks) | {"PATH": paths}, capture_output=True, text=True, timeout=120
    )
    said = sorted(line for line in started.stdout.splitlines() if "was told" in line)
    assert said == ["rank 0 of 2 was told a word", "rank 1 of 2 was told a word"], started.stderr


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (
            {"SLURM_NTASKS": "16", "SLURM_NNODES": "2"},
            "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d "
            '--rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)"'
            ":29500 -m megakd train run.yaml 'data.train=[a, b]'",
        ),
        ({"SLURM_NTASKS": "2", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"}, "--nnodes=2 --nproc-per-node=4 "),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8", "OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE is 4"),
        ({"PMI_SIZE": "4"}, "torchrun --nnodes=NODES --nproc-per-node=GPUS .* -m megakd train"),
    ],
)
def test_tasks_that_nobody_numbered_are_refused(monkeypatch, variables, words):
    monkeypatch.setattr(sys, "argv", ["/opt/bin/megakd", "train", "run.yaml", "data.train=[a, b]"])
    with pytest.raises(ConfigError) as caught:
        read_launch(variables)
    assert words in str(caught.value) or re.search(words, str(caught.value)), caught.value
    for numbered in ({"WORLD_SIZE": "1"}, {"RANK": "0"}):
        assert read_launch(variables | numbered).world_size == 1


@pytest.mark.parametrize(
    "variables", [{"SLURM_NTASKS": "1"}, {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"}, {"SLURM_JOB_ID": "7"}]
)
def test_one_task_of_slurm_is_one_rank(variables):
    assert read_launch(variables).world_size == 1
