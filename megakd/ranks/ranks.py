"""The default process group of a launch as a `with` block, its signals and its log."""

import contextlib
import datetime
import logging
import os
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist

from megakd.errors import ConfigError, MegakdError
from megakd.progress import LogHandler
from megakd.ranks.failure import FailureWatch
from megakd.ranks.launch import Launch, open_store, read_launch, resolve_device


class Ranks:
    """The default process group of this launch, from entering to leaving the `with` block.

    An error that leaves the block ends a process that has peers (see megakd.ranks.failure: the peers end too, within
    seconds, with exit code 1); alone it is raised on. SIGTERM inside the block is remembered, not obeyed; and so is the
    first Ctrl-C, from the first call of agree_to_stop on (who never asks is interrupted at once).

    Args:
        device: `auto`, `cuda` (NCCL) or `cpu` (gloo).
        rendezvous_seconds: how long the ranks wait for each other at the start.
        collective_seconds: how long a collective may take before the process group gives up.

    Attributes:
        launch: what the environment said.
        rank, world_size, local_rank: of this process.
        is_main: rank 0, the one that writes and prints.
        backend: `nccl` or `gloo`.
        device: torch.device of this rank.

    Raises:
        ConfigError: the environment of the launch is wrong, or the device is not there.
        MegakdError (on entering): the port is in use, or ranks are missing after rendezvous_seconds.
    """

    def __init__(self, device: str = "auto", *, rendezvous_seconds: float = 300, collective_seconds: float = 600):
        # Megatron overlaps tensor parallel collectives only so, and CUDA reads it when the first context is made.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        self.launch = read_launch(os.environ)
        self.rank, self.world_size, self.local_rank = self.launch.rank, self.launch.world_size, self.launch.local_rank
        self.is_main = self.rank == 0
        self.backend = "nccl" if resolve_device(device) == "cuda" else "gloo"
        self.device = rank_device(self.backend, self.launch)
        self._rendezvous_seconds = rendezvous_seconds
        self._collective_timeout = datetime.timedelta(seconds=collective_seconds)
        self._stop = threading.Event()
        self._store: dist.Store | None = None
        self._watch: FailureWatch | None = None
        self._old_handlers = {}

    def __enter__(self) -> "Ranks":
        start_logging(self.rank)
        if self.world_size == 1:
            self._store = dist.HashStore()
            self._start_group()
        else:
            self._store = open_store(self.launch, hosts=self.launch.hosts_store, seconds=self._rendezvous_seconds)
            self._watch = FailureWatch(self.launch, self._store)
            try:
                meet(self.launch, self._store, self._rendezvous_seconds)
                self._start_group()
            except BaseException as error:
                self._watch.fail(error)
        # Only now: a rank that waits inside torch for its peers could not act on a remembered SIGTERM.
        if threading.current_thread() is threading.main_thread():
            self._remember(signal.SIGTERM)
        return self

    def __exit__(self, kind, error, trace) -> None:
        ended_well = error is None or (isinstance(error, SystemExit) and not error.code)
        if self._watch is not None:
            if not ended_well:
                self._watch.fail(error)
            self._watch.close()
            with contextlib.suppress(dist.DistError):
                part(self.launch, self._store, self._rendezvous_seconds)
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        if dist.is_initialized():
            dist.destroy_process_group()

    def stop_requested(self) -> bool:
        """True once this rank has got SIGTERM or Ctrl-C; other ranks may not have got theirs yet."""
        return self._stop.is_set()

    def agree_to_stop(self) -> bool:
        """True on every rank when any rank has got SIGTERM or Ctrl-C.

        Collectives: one all-reduce of 4 bytes over all ranks.
        """
        if list(self._old_handlers) == [signal.SIGTERM] and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            self._remember(signal.SIGINT)  # a job in the background goes on ignoring it
        flag = torch.tensor(int(self.stop_requested()), dtype=torch.int32, device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def _remember(self, number: int) -> None:
        def stop(*_):
            self._stop.set()
            if number == signal.SIGINT:
                signal.signal(number, self._old_handlers[number])
                if self.is_main:
                    sys.stderr.write("\nstopping after what is under way (Ctrl-C once more: at once)\n")

        self._old_handlers[number] = signal.signal(number, stop)

    def _start_group(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        elif sys.platform == "linux" and self.launch.local_world_size == self.world_size:
            # All ranks are on this machine: gloo need not look for its outward address, which can take half a minute.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            self.backend,
            store=dist.PrefixStore("group", self._store),
            rank=self.rank,
            world_size=self.world_size,
            timeout=self._collective_timeout,
        )


def rank_device(backend: str, launch: Launch) -> torch.device:
    """The device of a rank: the CPU for gloo, the GPU with the number of its local rank for NCCL.

    Raises:
        ConfigError: there are fewer GPUs than local ranks.
    """
    if backend == "gloo":
        return torch.device("cpu")
    if launch.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {launch.rank} is local rank {launch.local_rank}, but torch sees {torch.cuda.device_count()} GPU(s)",
            hint="start at most one rank per GPU (`torchrun --nproc-per-node`), or check CUDA_VISIBLE_DEVICES",
        )
    return torch.device("cuda", launch.local_rank)


def meet(launch: Launch, store: dist.Store, seconds: float) -> None:
    """Waits until every rank has arrived.

    Raises:
        MegakdError: names the ranks that have not, after `seconds`.
    """
    arrived = [f"arrived/{rank}" for rank in range(launch.world_size)]
    store.set(arrived[launch.rank], "")
    try:
        store.wait(arrived, datetime.timedelta(seconds=seconds))
    except dist.DistError as error:
        missing = ", ".join(str(rank) for rank, key in enumerate(arrived) if not store.check([key]))
        raise MegakdError(
            f"rank {launch.rank} waited {seconds:.0f} s at {launch.where} for all {launch.world_size} ranks; "
            f"missing: rank {missing}",
            hint="look for the first error of the missing ranks, and check that every node starts the same launch",
        ) from error


def part(launch: Launch, store: dist.Store, seconds: float) -> None:
    """Says that this rank is done; a rank that carries the store stays until all are, or `seconds` have passed."""
    done = store.add("done", 1)
    deadline = time.monotonic() + seconds
    while launch.hosts_store and done < launch.world_size and time.monotonic() < deadline:
        time.sleep(0.05)
        done = store.add("done", 0)


def start_logging(rank: int) -> None:
    """Sends log lines to stderr: information and warnings of rank 0, warnings alone of others, with their rank."""
    prefix = "" if rank == 0 else f"rank {rank}: "
    logging.basicConfig(
        format=f"%(asctime)s {prefix}%(levelname)s %(message)s", datefmt="%H:%M:%S", handlers=[LogHandler()]
    )
    logging.getLogger("megakd").setLevel(logging.INFO if rank == 0 else logging.WARNING)
