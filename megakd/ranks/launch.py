"""How this process was launched, and the store through which its ranks find each other."""

import datetime
import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megakd.errors import ConfigError, MegakdError


@dataclass(frozen=True)
class Launch:
    """What the environment says about this rank; without a launcher it is one rank of one.

    Attributes:
        rank, world_size: over all machines.
        local_rank, local_world_size: on this machine; local_world_size is 0 when the launcher did not say.
        address, port: of the store.
        hosts_store: this process carries the store; under torchrun the launcher does.
        attempt: how often torchrun has restarted the ranks.
        torchrun: the parent process is torchrun's; without it, nothing follows from the parent's end.
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

    @property
    def where(self) -> str:
        """address:port, for messages."""
        return f"{self.address}:{self.port}"

    def describe(self) -> dict:
        """Of this process and its launch, for monitors outside."""
        return {
            "host": socket.gethostname(), "pid": os.getpid(), "rank": self.rank, "world_size": self.world_size,
            "attempt": self.attempt,
        }  # fmt: skip


def read_launch(environ: Mapping[str, str]) -> Launch:
    """Reads torchrun's variables; one rank alone needs neither address nor port.

    Raises:
        ConfigError: WORLD_SIZE is above 1 and another variable is missing, or one is not a number.
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

    world_size = number("WORLD_SIZE", "1")
    if world_size == 1:
        return Launch(local_rank=number("LOCAL_RANK", "0"), torchrun="TORCHELASTIC_RUN_ID" in environ)
    rank = number("RANK")
    if not 0 <= rank < world_size:
        raise ConfigError(f"environment: RANK {rank} is outside 0..{world_size - 1} (WORLD_SIZE is {world_size})")
    return Launch(
        rank=rank,
        world_size=world_size,
        local_rank=number("LOCAL_RANK"),
        local_world_size=number("LOCAL_WORLD_SIZE", "0"),
        address=environ.get("MASTER_ADDR", "127.0.0.1"),
        port=number("MASTER_PORT"),
        hosts_store=rank == 0 and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        attempt=number("TORCHELASTIC_RESTART_COUNT", "0"),
        torchrun="TORCHELASTIC_RUN_ID" in environ,
    )


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
    """Connects to the launch's TCP store (or carries it), under a prefix that a restarted attempt does not share.

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
    return dist.PrefixStore(f"megakd/{launch.attempt}", store)


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
