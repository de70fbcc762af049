"""When a launch stands still: what every rank was doing, and which one keeps the others waiting."""

import contextlib
import faulthandler
import json
import os
import pathlib
import sys
import time

import torch
import torch.distributed as dist

from megakd.ranks.launch import Launch, read_json
from megakd.ranks.peers import Peers
from megakd.ranks.pulse import Pulse

FOLDER = "stuck"  # in the run folder
FLIGHT_RECORD = "nccl_"  # and the rank
OLDER_NAMES = ("TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
ANSWER_SECONDS = 10.0
SILENCE_SECONDS = 4.0  # a watch speaks once a second


class Standstill:
    """Notices when this rank or the next one stands still, and finds out whom the launch waits for.

    Args:
        silent_seconds: how long the next rank's watch may say nothing where its phase has no limit.
        reports: the run folder, for the stacks; None: they go to stderr.
    """

    def __init__(self, launch: Launch, pulse: Pulse, silent_seconds: float, reports: pathlib.Path | None):
        self.launch, self.pulse, self.silent_seconds, self.reports = launch, pulse, silent_seconds, reports
        self._turns, self._heard, self._silent_seconds, self._testified = 0, None, 0.0, False

    def look(self, store: dist.Store, turn_seconds: float) -> str | None:
        """One turn of the watch: say where this rank is; the reason for an alarm, when there is one.

        After an alarm of any rank: write the stacks, once.
        """
        rank = self.launch.rank
        if store.check(["alarm"]):
            if not self._testified:
                self._testified = True
                self.testify(store)
            return None
        self._turns += 1
        store.set(f"pulse/{rank}", json.dumps(self.pulse.describe() | {"turns": self._turns}))
        limit = self.pulse.limit_seconds
        if limit is not None and self.pulse.still_seconds > limit:
            return f"rank {rank} has been in {where(self.pulse.describe())}"
        other = (rank + 1) % self.launch.world_size
        said = read_json(store, f"pulse/{other}")
        if said is None or said["turns"] != self._heard:
            self._heard, self._silent_seconds = said and said["turns"], 0.0
            return None
        self._silent_seconds += turn_seconds
        if self._silent_seconds > (said["limit_seconds"] or self.silent_seconds) and not store.check([f"done/{other}"]):
            return f"rank {other} has said nothing for {self._silent_seconds:.0f} s"
        return None

    def testify(self, store: dist.Store) -> None:
        """Tell the other ranks where this one is, and put the stacks of all its threads into the run folder."""
        rank = self.launch.rank
        state = self.pulse.describe() | {"waits": in_collective()}
        store.set(f"testimony/{rank}", json.dumps(state))
        header = f"rank {rank}, process {os.getpid()}, {time.strftime('%F %T')}: {json.dumps(state)}\n"
        if self.reports is None:
            sys.stderr.write(header)
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
            return
        with contextlib.suppress(OSError):  # a full disk must not keep the launch from ending
            folder = self.reports / FOLDER
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f"rank_{rank:05d}.txt", "w", encoding="utf-8") as file:
                file.write(header)
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            record = flight_record()
            if record:
                (folder / f"{FLIGHT_RECORD}{rank}").write_bytes(record)

    def find_laggard(self, store: dist.Store, peers: Peers, why: str) -> tuple[int, str]:
        """Raise the alarm, wait for the ranks' testimonies, and say which rank the others wait for.

        Returns:
            (rank, text); -1 where no single rank can be blamed.
        """
        own = json.dumps(self.launch.rank)
        if store.compare_set("alarm", "", own).decode() != own:
            time.sleep(2 * ANSWER_SECONDS)  # whoever was first names the rank, and this process ends meanwhile
        ranks, states = range(self.launch.world_size), {}
        deadline = time.monotonic() + ANSWER_SECONDS
        while len(states) < len(ranks) and time.monotonic() < deadline:
            time.sleep(0.2)
            for rank in ranks:
                if rank not in states and (state := read_json(store, f"testimony/{rank}")):
                    states[rank] = state
        if self.reports is not None:
            why += f" (stacks of all threads: {self.reports / FOLDER})"
        return blame(states, peers, len(ranks), why)


def silent_ranks(store: dist.Store, world_size: int) -> list[int]:
    """Ranks whose watch says nothing any more; none where one has not spoken yet. Takes SILENCE_SECONDS.

    Raises:
        DistError: the store is gone.
    """
    keys = [f"pulse/{rank}" for rank in range(world_size)]
    if not store.check(keys):
        return []
    before = store.multi_get(keys)
    time.sleep(SILENCE_SECONDS)
    return [rank for rank, said in enumerate(store.multi_get(keys)) if said == before[rank]]


def record_flight(reports: pathlib.Path) -> None:
    """Have NCCL write its last collectives into the run folder when one of them times out; before the group starts."""
    with contextlib.suppress(OSError):  # the run will say so itself
        (reports / FOLDER).mkdir(parents=True, exist_ok=True)
    named_anew = hasattr(torch._C._distributed_c10d, "_dump_fr_trace")  # and warns of the older names
    size, file = ("TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE") if named_anew else OLDER_NAMES
    os.environ.setdefault(size, "2000")
    os.environ.setdefault(file, str(reports.absolute() / FOLDER / FLIGHT_RECORD))
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def flight_record() -> bytes | None:
    """What NCCL's flight recorder holds, as torch's own dump writes it; None without NCCL."""
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    used = dist.is_initialized() and "nccl" in dist.get_backend()
    return dump() if used and dump is not None else None


def in_collective() -> bool:
    """Whether a thread of this process is inside torch.distributed: it waits for others, or for their data."""
    for frame in sys._current_frames().values():
        while frame is not None:
            if frame.f_code.co_filename.endswith("distributed_c10d.py"):
                return True
            frame = frame.f_back
    return False


def blame(states: dict[int, dict], peers: Peers, world_size: int, why: str) -> tuple[int, str]:
    """Which rank the others wait for, by their testimonies: one that gives none, one that is behind, one that works."""
    silent = [rank for rank in range(world_size) if rank not in states]
    if silent:
        names = ", ".join(map(peers.describe, silent[:8]))
        return silent[0], f"{why}; no answer within {ANSWER_SECONDS:.0f} s from {names}"
    behind = min(state["marks"] for state in states.values())
    late = [rank for rank, state in states.items() if state["marks"] == behind]
    if len(late) == world_size:
        late = [rank for rank in late if not states[rank]["waits"]]
    if not late or (len(late) == world_size and world_size > 1):
        return -1, f"{why}; all ranks are in {where(states[0])}, and none can be blamed from outside"
    names = ", ".join(f"{peers.describe(rank)} in {where(states[rank])}" for rank in late[:8])
    return late[0], f"{why}; the others wait for {names}"


def where(state: dict) -> str:
    return f"{state['phase']} of step {state['step']} for {state['still_seconds']:.0f} s"
