"""The default process group of a launch as a `with` block, its signals and its log."""

import contextlib
import datetime
import json
import logging
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist

from megakd.errors import ConfigError, MegakdError
from megakd.progress import LogHandler
from megakd.ranks import stuck
from megakd.ranks.agreement import check_facts
from megakd.ranks.failure import FailureWatch
from megakd.ranks.launch import Launch, open_store, read_launch, resolve_device
from megakd.ranks.peers import Peers, identity
from megakd.ranks.pulse import Pulse
from megakd.ranks.sections import watched_sections
from megakd.ranks.signals import StopSignals, name_of


class Ranks:
    """The default process group of this launch, from entering to leaving the `with` block.

    An error that leaves the block ends a process that has peers (see megakd.ranks.failure: the peers end too, within
    seconds, with exit code 1); alone it is raised on. SIGTERM, SIGUSR1, SIGHUP and the first Ctrl-C inside the block
    are remembered, not obeyed, from the first call of agree_to_stop on. Before that, and where nobody ever asks, they
    end the launch at once.

    Args:
        device: `auto`, `cuda` (NCCL) or `cpu` (gloo).
        rendezvous_seconds: how long the ranks wait for each other at the start.
        collective_seconds: how long a collective may take before the process group gives up.
        watchdog_seconds: how long a phase that `pulse` marks may take; None: see megakd.ranks.pulse.
        reports: the run folder: gets a heartbeat, and the stacks of a launch that stands still; None: neither.
        facts: plain values that must be the same on every rank; compared before anything else.

    Attributes:
        launch: what the environment said.
        rank, world_size, local_rank: of this process.
        is_main: rank 0, the one that writes and prints.
        backend: `nccl` or `gloo`.
        device: torch.device of this rank.
        pulse: marked by whoever begins something.

    Raises:
        ConfigError: the environment of the launch is wrong, the device is not there, or ranks' facts differ.
        MegakdError (on entering): the port is in use, or ranks are missing after rendezvous_seconds.
    """

    def __init__(
        self,
        device: str = "auto",
        *,
        rendezvous_seconds: float = 300,
        collective_seconds: float = 600,
        watchdog_seconds: float | None = None,
        reports: str | None = None,
        facts: Mapping[str, object] = {},
    ):
        # Megatron overlaps tensor parallel collectives only so, and CUDA reads it when the first context is made.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        self.launch = read_launch(os.environ)
        self.rank, self.world_size, self.local_rank = self.launch.rank, self.launch.world_size, self.launch.local_rank
        self.is_main = self.rank == 0
        self.backend = "nccl" if resolve_device(device) == "cuda" else "gloo"
        self.device = rank_device(self.backend, self.launch)
        self.pulse = Pulse(watchdog_seconds)
        self._rendezvous_seconds = rendezvous_seconds
        self._collective_timeout = datetime.timedelta(seconds=collective_seconds)
        self._reports = None if reports is None else pathlib.Path(reports)
        self._facts = {"backend": self.backend, **facts}
        self._signals: StopSignals | None = None
        self._store: dist.Store | None = None
        self._watch: FailureWatch | None = None
        self._early_stop: Callable[[], None] | None = None
        self._early = True
        self._met, self._stop_at = time.monotonic(), float("inf")

    def __enter__(self) -> "Ranks":
        start_logging(self.rank)
        self._signals = StopSignals(self._signalled, by_person=not self.launch.torchrun)
        self._signals.install()
        sections = watched_sections(os.environ)
        if sections is not None:
            self.pulse.listener = sections.mark
        try:
            if self.world_size == 1:
                self._store = dist.HashStore()
            else:
                self._store = open_store(self.launch, hosts=self.launch.hosts_store, seconds=self._rendezvous_seconds)
        except BaseException:
            self._signals.restore()
            raise
        self._watch = FailureWatch(
            self.launch,
            self._store,
            self._signals,
            self.pulse,
            silent_seconds=self._collective_timeout.total_seconds() / 2,
            reports=self._reports,
        )
        try:
            identities = meet(self.launch, self._store, self._rendezvous_seconds)
            check_facts(self.launch, self._store, self._facts, self._rendezvous_seconds)
            self._start_group()
            self._watch.peers = Peers(self.rank, identities)
            self._met = time.monotonic()
        except BaseException as error:
            self._leave(error)
            raise
        return self

    def __exit__(self, kind, error, trace) -> None:
        ended_well = error is None or (isinstance(error, SystemExit) and not error.code)
        self._leave(None if ended_well else error)

    def _leave(self, error: BaseException | None) -> None:
        """The end of the block; with peers an error ends the process here."""
        if error is not None and self.world_size > 1:
            self._watch.fail(error)
        self._watch.close()
        self._signals.restore()
        self._signals.close()
        with contextlib.suppress(dist.DistError):
            part(self.launch, self._store, self._rendezvous_seconds)
        if dist.is_initialized():
            dist.destroy_process_group()

    def stop_requested(self) -> bool:
        """True once this rank has been asked to stop, or its time is over; of other ranks neither may be true yet."""
        return self._signals.requested.is_set() or time.monotonic() >= self._stop_at

    def stop_after(self, seconds: float) -> None:
        """Ask this rank to stop so many seconds after the ranks have met."""
        self._stop_at = self._met + seconds

    def agree_to_stop(self) -> bool:
        """True on every rank when any rank has been asked to stop, or has lost its launcher.

        Collectives: one all-reduce of 4 bytes over all ranks.
        """
        self._early = self._watch.early = False
        flag = torch.tensor(int(self.stop_requested()), dtype=torch.int32, device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def on_early_stop(self, function: Callable[[], None]) -> None:
        """Say what rank 0 does when the launch is asked to stop before the first agree_to_stop; it then ends at once.

        With nothing said the launch ends with code 128 + the signal's number, with this function with 0.

        Args:
            function: called once, in any thread, while the main thread may be doing anything.
        """
        self._early_stop = self._watch.early_stop = function

    def _signalled(self, number: int) -> None:
        """In the main thread. Where there is a watch for several ranks, it acts on an early stop."""
        if self._early and (self._watch is None or self.world_size == 1):
            if self._early_stop is not None:
                self._early_stop()
                sys.stderr.write(f"asked to stop by {name_of(number)} before the first step\n")
                raise SystemExit(0)
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        if number == signal.SIGINT and self.is_main:
            more = "" if self.launch.torchrun else " (Ctrl-C once more: at once)"
            sys.stderr.write(f"\nstopping after what is under way{more}\n")

    def _start_group(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            if self._reports is not None:
                stuck.record_flight(self._reports)
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

    A task to which Slurm has given a GPU of its own (`--gpus-per-task=1`) sees that one alone.

    Raises:
        ConfigError: there are fewer GPUs than local ranks.
    """
    if backend == "gloo":
        return torch.device("cpu")
    own = os.environ.get("SLURM_GPUS_PER_TASK", "").rpartition(":")[2] == "1"
    if own and not launch.torchrun and torch.cuda.device_count() == 1:
        return torch.device("cuda", 0)
    if launch.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {launch.rank} is local rank {launch.local_rank}, but torch sees {torch.cuda.device_count()} GPU(s)",
            hint="start at most one rank per GPU (`torchrun --nproc-per-node`), or check CUDA_VISIBLE_DEVICES",
        )
    return torch.device("cuda", launch.local_rank)


def meet(launch: Launch, store: dist.Store, seconds: float) -> dict[int, dict]:
    """Waits until every rank has arrived; returns who they are (megakd.ranks.peers.identity).

    Raises:
        MegakdError: names the ranks that have not, after `seconds`.
    """
    arrived = [f"arrived/{rank}" for rank in range(launch.world_size)]
    store.set(arrived[launch.rank], json.dumps(identity()))
    try:
        store.wait(arrived, datetime.timedelta(seconds=seconds))
    except dist.DistError as error:
        missing = ", ".join(str(rank) for rank, key in enumerate(arrived) if not store.check([key]))
        raise MegakdError(
            f"rank {launch.rank} waited {seconds:.0f} s at {launch.where} for all {launch.world_size} ranks; "
            f"missing: rank {missing}",
            hint="look for the first error of the missing ranks, and check that every node starts the same launch",
        ) from error
    return {rank: json.loads(text) for rank, text in enumerate(store.multi_get(arrived))}


def part(launch: Launch, store: dist.Store, seconds: float) -> None:
    """Says that this rank is done; a rank that carries the store stays until all are, or `seconds` have passed."""
    store.set(f"done/{launch.rank}", "")  # what follows is no kill
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
