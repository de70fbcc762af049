"""How a launch of several ranks ends: after a failure, a kill, a stop before the first step, or when it stands still.

1. The first rank that knows why the launch ends writes it to the store (key `end`); a failing rank also prints it in
   full. Ranks leave with os._exit, because destroying a process group whose peers wait in a collective can hang.
2. A thread in every rank, the watch, looks at that key once a second, over a connection of its own, since the main
   thread may be blocked in a collective. It prints one line, "rank 1 stopped: rank 0 failed with ...", and leaves.
3. The watch sees at once when a rank of its machine is killed, and says so in the killed rank's name.
4. A rank whose collective fails because its peer is gone prints that same line; when the peer left no message (a whole
   machine lost), the line names the ranks whose watch has fallen silent.
5. A rank whose launcher is gone asks to stop, as a signal would, and leaves in any case after 45 seconds. A rank that
   cannot reach the store for a minute leaves too; so does one whose watch waits for it, for a network that is cut
   breaks no connection.
6. Once a second the watch says where its rank is, and looks at the next rank. When its own rank or that one stands
   still for longer than the phase may take, all ranks write their stacks and one is named (megakd.ranks.stuck).
"""

import contextlib
import json
import multiprocessing
import os
import pathlib
import select
import sys
import threading
import time
import traceback
from collections.abc import Callable

import torch.distributed as dist

from megakd.errors import MegakdError
from megakd.ranks.agreement import name_ranks
from megakd.ranks.causes import PEER_LOST, TIMED_OUT, first_line, says
from megakd.ranks.launch import Launch, open_store, read_json
from megakd.ranks.peers import Peers
from megakd.ranks.pulse import Pulse, write_heartbeat
from megakd.ranks.signals import StopSignals, name_of
from megakd.ranks.stuck import Standstill, silent_ranks

WATCH_SECONDS = 1.0
HEARTBEAT_SECONDS = 10.0
LOST_STORE_SECONDS = 60.0
LOST_LAUNCHER_SECONDS = 45.0
LAST_WORDS_SECONDS = 2.0
INTERRUPTED = 130
HEARTBEAT_FILE = "heartbeat.json"


class FailureWatch:
    """Tells the other ranks how this one ends, and ends this process when another one has.

    Args:
        launch: of this process. Of one rank alone, only a standstill is watched for.
        store: the launch's store, used from the main thread alone when there are more ranks.
        signals: installed.
        pulse: marked by the main thread.
        silent_seconds: how long another rank's watch may say nothing where no other limit is known.
        reports: the run folder, for stacks and the heartbeat; None: none.

    Attributes:
        peers: set once the ranks have met; killed and stopped ones are seen from then on.
        early_stop: what is done on rank 0 when the launch is asked to stop before the ranks first agree on that, and
            then ends with code 0; None: nothing is done, and the code is 128 + the signal.
        early: a stop request ends the launch at once; until the ranks first agree.
    """

    def __init__(
        self,
        launch: Launch,
        store: dist.Store,
        signals: StopSignals,
        pulse: Pulse,
        *,
        silent_seconds: float,
        reports: pathlib.Path | None,
    ):
        self.launch, self.store, self.signals, self.pulse = launch, store, signals, pulse
        self.reports, self.standstill = reports, Standstill(launch, pulse, silent_seconds, reports)
        self.peers: Peers | None = None
        self.early_stop: Callable[[], None] | None = None
        self.early = True
        self._launcher, self._launcher_gone_at = os.getppid(), None
        self._heartbeat_at, self._turns = 0.0, 0
        self._closing = threading.Event()
        self._leaving = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="megakd-watch", daemon=True)
        self._thread.start()
        if launch.world_size > 1:
            threading.Thread(target=self._guard, name="megakd-guard", daemon=True).start()

    def close(self) -> None:
        """Ends the watch; from here on the peers' end is not a failure."""
        self._closing.set()
        self.signals.poke()
        self._thread.join()
        self.pulse.mark("end", self.pulse.step)
        self._beat(0.0, last=True)
        if self.peers is not None:
            self.peers.close()

    def fail(self, error: BaseException) -> None:
        """Reports an error of the main thread, here or as another rank's, and exits; never returns."""
        rank = self.launch.rank
        if self.early and self.signals.requested.is_set():
            self._end_as(self._claim("stop", f"was asked to stop by {name_of(self.signals.number)}"))
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            code = getattr(error, "code", INTERRUPTED)
            self._claim("leave", "was interrupted")
            self._leave("", code if isinstance(code, int) else 1)
        if says(error, TIMED_OUT) and self.peers is not None:
            with contextlib.suppress(dist.DistError):
                self._raise_alarm(self.store, f"rank {rank} waited in vain: {first_line(error)}")
        elif says(error, PEER_LOST):
            self._end_as(self._await_end() or self._claim_lost(first_line(error)))
        first = self._claim("failure", f"failed with {type(error).__name__}: {first_line(error)}")
        if first["by"] != rank:
            self._end_as(first)
        if isinstance(error, MegakdError):
            self._leave(f"{type(error).__name__}: {error}")
        self._leave(f"rank {rank} failed\n{''.join(traceback.format_exception(error))}".rstrip())

    def _claim(self, kind: str, text: str, rank: int | None = None, store: dist.Store | None = None) -> dict:
        """Records why the launch ends, unless it was recorded before; returns what is recorded, this if nothing can.

        Args:
            kind: `failure`, `killed`, `stuck`, `stop` (asked to, early) or `leave` (a person at the keyboard).
            text: what follows "rank N " in the other ranks' message.
            rank: of whom it is said, where that is not this one.
        """
        own = {"kind": kind, "rank": self.launch.rank if rank is None else rank, "text": text}
        own["by"] = self.launch.rank
        try:
            return json.loads((store or self.store).compare_set("end", "", json.dumps(own)))
        except dist.DistError:
            return own

    def _await_end(self) -> dict | None:
        """Why the launch ends, as a vanished peer or its neighbours recorded it; it may still be on its way."""
        deadline = time.monotonic() + LAST_WORDS_SECONDS
        end = None
        with contextlib.suppress(dist.DistError):
            while end is None and time.monotonic() < deadline:
                end = read_json(self.store, "end")
                time.sleep(0.1)
        return end

    def _claim_lost(self, why: str) -> dict:
        """A peer is gone and left no message, nor did its neighbours: say which, if it is to be known."""
        silent = []
        try:
            silent = silent_ranks(self.store, self.launch.world_size)
        except dist.DistError:
            why += f"; nor does the store at {self.launch.where} answer"
        if not silent:
            return self._claim("failure", f"lost a peer that left no message (its machine gone, or killed?): {why}")
        rank, *more = silent
        who, others = self.peers.identities[rank], f", as are {name_ranks(more)}" if more else ""
        gone = f"is gone without a word (process {who['pid']} on {who['host']}; its machine lost, or killed?){others}"
        return self._claim("killed", f"{gone}: {why}", rank=rank)

    def _watch(self) -> None:
        store, answered, turned = None, time.monotonic(), time.monotonic()
        poll = select.poll()
        poll.register(self.signals.wake, select.POLLIN)
        peers = None
        while True:
            ended = []
            if peers is None and self.peers is not None:
                peers = self.peers
                ended = peers.gone
                for descriptor in peers.ranks:
                    poll.register(descriptor, select.POLLIN)
            for descriptor, _ in poll.poll(0 if ended else 1000 * WATCH_SECONDS):
                if descriptor != self.signals.wake:
                    poll.unregister(descriptor)
                    ended.append(peers.ranks[descriptor])
            if self._closing.is_set():
                return
            self._turns += 1
            now = time.monotonic()
            turn, turned = min(now - turned, 2 * WATCH_SECONDS), now  # a stopped watch has not been watching
            self.signals.collect()
            self._look_at_launcher()
            self._beat(turn)
            try:
                store = store or self._connect()
                self._look_at_store(store, turn)
                answered = time.monotonic()
            except (dist.DistError, MegakdError) as error:
                store = None
                if time.monotonic() - answered > LOST_STORE_SECONDS:
                    what = f"the store at {self.launch.where} is gone (launcher or rank 0 killed?)"
                    self._leave(f"rank {self.launch.rank} stopped: {what}: {first_line(error)}")
            for rank in ended:
                self._look_at_ended(store, rank)

    def _guard(self) -> None:
        """Ends a rank whose watch hangs in the store. It counts its own turns: a stopped process has not waited."""
        seen, waited = 0, 0.0
        while self._thread.is_alive():
            self._thread.join(WATCH_SECONDS)
            seen, waited = self._turns, waited + WATCH_SECONDS if self._turns == seen else 0.0
            if waited > LOST_STORE_SECONDS:
                what = f"nothing comes from the store at {self.launch.where} any more (its machine gone, network cut?)"
                self._leave(f"rank {self.launch.rank} stopped: {what}")

    def _connect(self) -> dist.Store:
        if self.launch.world_size == 1:
            return self.store
        return open_store(self.launch, hosts=False, seconds=LOST_STORE_SECONDS / 12)

    def _look_at_launcher(self) -> None:
        """Under torchrun: ask to stop when it is gone, and end when that takes too long."""
        if not self.launch.torchrun or os.getppid() == self._launcher:
            return
        text = f"rank {self.launch.rank} stopped: its launcher (process {self._launcher}) is gone"
        if self.early:
            self._leave(text)
        if self._launcher_gone_at is None:
            self._launcher_gone_at = time.monotonic()
            self.signals.requested.set()
            sys.stderr.write(f"rank {self.launch.rank}: the launcher is gone: stopping after this step\n")
        if time.monotonic() - self._launcher_gone_at > LOST_LAUNCHER_SECONDS:
            self._leave(f"{text}, and no step has ended since")

    def _look_at_store(self, store: dist.Store, turn: float) -> None:
        end = read_json(store, "end")
        if end is not None and end["by"] != self.launch.rank:
            self._end_as(end)
        if self.early and self.signals.requested.is_set() and self.launch.world_size > 1:
            self._end_as(self._claim("stop", f"was asked to stop by {name_of(self.signals.number)}", store=store))
        if self.peers is not None:
            why = self.standstill.look(store, turn)
            if why is not None:
                threading.Thread(target=self._raise_alarm, args=(store, why), daemon=True).start()

    def _raise_alarm(self, store: dist.Store, why: str) -> None:
        """Has all ranks say where they are, and ends the launch in the name of the one that the others wait for."""
        rank, text = self.standstill.find_laggard(store, self.peers, why)
        self._end_as(self._claim("stuck", f"is stuck: {text}" if rank >= 0 else text, rank=rank, store=store))

    def _look_at_ended(self, store: dist.Store | None, rank: int) -> None:
        """A rank of this machine has ended: well, with a message, or killed; unknown when the store went first."""
        try:
            done = store is not None and store.check([f"done/{rank}"])
        except dist.DistError:
            done = False
        if not done and self._launcher_gone_at is None and not self._closing.is_set():
            who = self.peers.identities[rank]
            text = f"was killed: process {who['pid']} on {who['host']} is gone without a word (out of memory?)"
            self._end_as(self._claim("killed", text, rank=rank, store=store))

    def _beat(self, turn: float, *, last: bool = False) -> None:
        self.pulse.turn(turn)
        if self.launch.rank == 0 and (last or time.monotonic() - self._heartbeat_at > HEARTBEAT_SECONDS):
            self._heartbeat_at = time.monotonic()
            if self.reports is not None:
                with contextlib.suppress(OSError):  # no folder yet, or a full disk: the run will say so itself
                    write_heartbeat(self.reports / HEARTBEAT_FILE, self.pulse, **self.launch.describe())

    def _end_as(self, end: dict) -> None:
        """Leaves for a recorded reason; never returns."""
        rank = self.launch.rank
        if end["kind"] == "leave":
            self._leave("", INTERRUPTED)
        if end["kind"] == "stop":
            if rank == 0 and self.early_stop is not None:
                self.early_stop()
            text = f"rank {end['rank']} {end['text']} before the first step" if rank == 0 else ""
            self._leave(text, 0 if self.early_stop is not None else 128 + (self.signals.number or 15))
        about = f"rank {end['rank']} {end['text']}" if end["rank"] >= 0 else end["text"]
        self._leave(f"rank {rank} stopped: {about}")

    def _leave(self, text: str, code: int = 1) -> None:
        """Prints, ends this process's own children, and exits without unwinding; never returns."""
        if not self._leaving.acquire(blocking=False):
            threading.Event().wait()  # another thread is already leaving, and takes this one along
        if text:
            sys.stderr.write(f"{text}\n")  # in one piece, whatever other ranks write
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        for child in multiprocessing.active_children():
            child.terminate()
        if self.launch.hosts_store:
            time.sleep(2 * WATCH_SECONDS)  # the other ranks read the message from this process
        os._exit(code)
