"""How this process was launched, and the store through which its ranks find each other."""

import datetime
import json
import os
import pathlib
import shlex
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megakd.errors import ConfigError, MegakdError
from megakd.ranks import slurm
from megakd.ranks.slurm import number_of

# Where Slurm, Open MPI and MPICH say how many tasks they have started.
TASKS = (slurm.TASKS, ("OMPI_COMM_WORLD_SIZE",), ("PMI_SIZE",))


@dataclass(frozen=True)
class Launch:
    """What the environment says about this rank; without a launcher it is one rank of one.

    Attributes:
        rank, world_size: over all machines.
        local_rank, local_world_size: on this machine; local_world_size is 0 when the launcher did not say.
        address, port: of the store.
        hosts_store: this process carries the store; under torchrun the launcher does.
        attempt: how often torchrun has restarted the ranks of this machine, or Slurm the job.
        torchrun: the parent process is torchrun's; without it, nothing follows from the parent's end.
        lasting_store: the store is torchrun's own, which ranks that are restarted find as the last ones left it.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    hosts_store: bool = False
    attempt: int = 0
    torchrun: bool = False
    lasting_store: bool = False

    @property
    def where(self) -> str:
        """address:port, for messages."""
        return f"{self.address}:{self.port}"

    @property
    def prefix(self) -> str:
        """Of the store's keys. torchrun's count differs from machine to machine, so it is left out where it may be."""
        return "megakd" if self.torchrun and not self.lasting_store else f"megakd/{self.attempt}"

    def describe(self) -> dict:
        """Of this process and its launch, for monitors outside."""
        return {
            "host": socket.gethostname(), "pid": os.getpid(), "rank": self.rank, "world_size": self.world_size,
            "attempt": self.attempt,
        }  # fmt: skip


def read_launch(environ: Mapping[str, str]) -> Launch:
    """Reads torchrun's variables, or srun's where there are none; one rank alone needs neither.

    Raises:
        ConfigError: WORLD_SIZE is above 1 and another variable is missing, one is not a number, or several processes
            would each be a launch of its own: tasks that nobody numbered, or torchruns that do not belong together.
    """

    def number(name: str, default: str | None = None) -> int:
        text = environ.get(name, default)
        try:
            return int(text)
        except (TypeError, ValueError):
            seen = "missing" if text is None else f"{text!r}, expected a number"
            raise ConfigError(
                f"environment: {name} is {seen}",
                hint="start ranks with `torchrun --nproc-per-node N -m megakd ...`, which sets RANK, WORLD_SIZE, "
                "LOCAL_RANK, MASTER_ADDR and MASTER_PORT",
            ) from None

    if "WORLD_SIZE" not in environ and "RANK" not in environ:
        if slurm.is_task(environ):
            return _of_slurm(environ)
        check_alone(environ, sys.argv)
    if "TORCHELASTIC_RUN_ID" in environ:
        slurm.check_one_launch(environ)
        check_restarts(environ)
    lasting_store = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    world_size = number("WORLD_SIZE", "1")
    rank = number("RANK", "0" if world_size == 1 else None)
    if not 0 <= rank < world_size:
        seen = "missing" if "WORLD_SIZE" not in environ else world_size
        raise ConfigError(
            f"environment: RANK {rank} is outside 0..{world_size - 1} (WORLD_SIZE is {seen})",
            hint="start ranks with `torchrun --nproc-per-node N -m megakd ...`, which sets both",
        )
    if world_size == 1:
        return Launch(local_rank=number("LOCAL_RANK", "0"), torchrun="TORCHELASTIC_RUN_ID" in environ)
    return Launch(
        rank=rank,
        world_size=world_size,
        local_rank=number("LOCAL_RANK"),
        local_world_size=number("LOCAL_WORLD_SIZE", "0"),
        address=environ.get("MASTER_ADDR", "127.0.0.1"),
        port=number("MASTER_PORT"),
        hosts_store=rank == 0 and not lasting_store,
        attempt=number("TORCHELASTIC_RESTART_COUNT", "0"),
        torchrun="TORCHELASTIC_RUN_ID" in environ,
        lasting_store=lasting_store,
    )


def _of_slurm(environ: Mapping[str, str]) -> Launch:
    """A rank that is a task of srun."""
    if environ.get("SLURM_HET_SIZE", "1") != "1":
        raise ConfigError(
            "environment: a step over the parts of a heterogeneous job does not number its tasks through",
            hint="start one torchrun on each node (`srun --ntasks-per-node=1 torchrun ...`)",
        )
    rank, world_size = int(environ["SLURM_PROCID"]), int(environ[slurm.TASKS[0]])
    address, port = slurm.meeting_place(environ)
    return Launch(
        rank=rank,
        world_size=world_size,
        local_rank=int(environ["SLURM_LOCALID"]),
        local_world_size=slurm.tasks_on_node(environ),
        address=address,
        port=port,
        hosts_store=rank == 0,
        attempt=number_of(environ, ("SLURM_RESTART_COUNT",), 0),
    )


def check_restarts(environ: Mapping[str, str]) -> None:
    """Raises ConfigError where torchrun would restart ranks of several nodes and have them meet in its own store: they
    would find what the ranks before them have left there, under counts of restarts that differ from node to node.

    Args:
        environ: of a rank that torchrun has started.
    """
    restarts, nodes = (number_of(environ, (name,), 0) for name in ("TORCHELASTIC_MAX_RESTARTS", "GROUP_WORLD_SIZE"))
    if restarts and nodes > 1 and environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ConfigError(
            f"environment: torchrun may restart the ranks of {nodes} nodes {restarts} times, in a store that is not "
            "made anew: they would not meet again",
            hint="export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 with --rdzv-backend=c10d, or leave --max-restarts at 0",
        )


def check_alone(environ: Mapping[str, str], command: Sequence[str]) -> None:
    """Raises ConfigError, with the command to start instead, where this is one of several tasks of srun or mpirun.

    Args:
        environ: without WORLD_SIZE and RANK.
        command: what this process was started with, as sys.argv has it.
    """
    for names in TASKS:
        name = next((name for name in names if environ.get(name, "").isdecimal()), None)
        if name is not None and int(environ[name]) > 1:
            raise ConfigError(
                f"environment: {name} is {environ[name]}, but WORLD_SIZE and RANK are missing: each of these tasks "
                "would run alone, as rank 0 of 1, and all of them in one folder",
                hint="start one torchrun on each node, which starts the ranks there (or `srun --ntasks=1` for one "
                f"rank; in a batch script, srun numbers its tasks):\n  {torchrun_command(environ, command)}",
            )


def torchrun_command(environ: Mapping[str, str], command: Sequence[str]) -> str:
    """The command line that starts the ranks of a Slurm job, or of any nodes where there is none."""
    program, *arguments = command
    named = "-m megakd" if pathlib.Path(program).name in ("megakd", "__main__.py") else shlex.quote(program)
    rest = " ".join([named, *map(shlex.quote, arguments)])
    if not any(name.startswith("SLURM_") for name in environ):
        return f"torchrun --nnodes=NODES --nproc-per-node=GPUS --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 {rest}"

    nodes = number_of(environ, slurm.NODES)
    tasks = -(-number_of(environ, slurm.TASKS) // nodes)
    ranks = tasks if tasks > 1 else number_of(environ, ("SLURM_GPUS_ON_NODE",))
    srun = f"srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 torchrun"
    if nodes == 1:
        return f"{srun} --standalone --nproc-per-node={ranks} {rest}"
    head = '"$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)":29500'
    meeting = f'--rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint={head}'
    return f"{srun} --nnodes={nodes} --nproc-per-node={ranks} {meeting} {rest}"


def resolve_device(name: str) -> str:
    """`auto`, `cuda` or `cpu` to `cuda` or `cpu`.

    Raises:
        ConfigError: `cuda` is asked for and torch sees no GPU.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
        raise ConfigError(
            f"run.device is cuda, but torch {torch.__version__} (built for {build}) sees no GPU",
            hint="set run.device to cpu or auto, or check the driver and CUDA_VISIBLE_DEVICES",
        )
    return name


def open_store(launch: Launch, *, hosts: bool, seconds: float) -> dist.Store:
    """Connects to the launch's TCP store (or carries it), under a prefix that no other attempt shares.

    Raises:
        MegakdError: the port is taken, or nothing answers within `seconds`.
    """
    if not hosts:
        _wait_for_listener(launch, seconds)
    timeout = datetime.timedelta(seconds=seconds)
    try:
        store = dist.TCPStore(launch.address, launch.port, is_master=hosts, timeout=timeout, wait_for_workers=False)
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        if "EADDRINUSE" not in reason:
            raise MegakdError(f"rank {launch.rank} cannot use the store at {launch.where}: {reason}") from error
        raise MegakdError(
            f"rank {launch.rank} cannot listen on {launch.where}: the port is in use",
            hint="another run may still be alive; choose another port with `torchrun --master-port PORT`, or let "
            "`torchrun --standalone` choose one",
        ) from error
    return dist.PrefixStore(launch.prefix, store)


def _wait_for_listener(launch: Launch, seconds: float) -> None:
    """Tries the port until something listens; torch's own client prints pages of C++ frames when nothing does."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((launch.address, launch.port), timeout=max(1.0, min(seconds, 5.0))).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise MegakdError(
                    f"rank {launch.rank} of {launch.world_size} reached nothing at {launch.where} within "
                    f"{seconds:.0f} s: {error}",
                    hint="check that rank 0 (or its torchrun) is alive and that MASTER_ADDR and MASTER_PORT name it",
                ) from error
            time.sleep(0.2)


def read_json(store: dist.Store, key: str):
    """What a rank has put into the store as JSON; None when none has."""
    return json.loads(store.get(key)) if store.check([key]) else None
