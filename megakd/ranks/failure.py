"""How a launch of several ranks ends when one of them fails.

1. The first rank that fails writes its message to the store (key `failure`) and, in full, to stderr. It leaves with
   os._exit, because destroying a process group whose peers wait in a collective can hang.
2. A thread in every rank looks at that key once a second, over a connection of its own, since the main thread may be
   blocked in a collective. It prints one line, "rank 1 stopped: rank 0 failed with ...", and leaves.
3. A rank whose collective fails because its peer is gone prints that same line; when the peer left no message (killed,
   out of memory), the line says so.
4. A rank that cannot reach the store for a minute leaves too: its launcher, or the rank that carries it, is gone.
"""

import contextlib
import json
import multiprocessing
import os
import sys
import threading
import time
import traceback

import torch.distributed as dist

from megakd.errors import MegakdError
from megakd.ranks.launch import Launch, open_store

WATCH_SECONDS = 1.0
LOST_STORE_SECONDS = 60.0
LAST_WORDS_SECONDS = 2.0
INTERRUPTED = 130
PEER_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Application timeout caused pair closure",
    "Timed out waiting",
    "ncclRemoteError",
    "NCCL communicator was aborted",
)


class FailureWatch:
    """Tells the other ranks of a failure here, and ends this process after a failure there.

    Args:
        launch: of this process; more than one rank.
        store: the launch's store, used from the main thread alone.
    """

    def __init__(self, launch: Launch, store: dist.Store):
        self.launch = launch
        self.store = store
        self._closing = threading.Event()
        self._leaving = threading.Lock()
        threading.Thread(target=self._watch, name="megakd-failure-watch", daemon=True).start()

    def close(self) -> None:
        """Ends the watch; from here on the peers' end is not a failure."""
        self._closing.set()

    def fail(self, error: BaseException) -> None:
        """Reports an error of the main thread, here or as another rank's, and exits; never returns."""
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            code = getattr(error, "code", INTERRUPTED)
            self._leave("", code if isinstance(code, int) else 1)
        rank = self.launch.rank
        if is_peer_loss(error):
            first = self._await_failure()
            if first is None:
                what = "a peer is gone and left no message (killed, or out of memory?)"
                self._leave(f"rank {rank} stopped: {what}: {first_line(error)}")
        else:
            first = self._claim(error)
        if first is not None:
            self._leave(_stopped_by(first, rank))
        if isinstance(error, MegakdError):
            self._leave(f"{type(error).__name__}: {error}")
        self._leave(f"rank {rank} failed\n{''.join(traceback.format_exception(error))}".rstrip())

    def _claim(self, error: BaseException) -> dict | None:
        """Records this rank's failure as the first; returns the other rank's when that was earlier."""
        own = json.dumps({"rank": self.launch.rank, "error": f"{type(error).__name__}: {first_line(error)}"})
        try:
            kept = self.store.compare_set("failure", "", own).decode()
        except dist.DistError:
            return None
        return None if kept == own else json.loads(kept)

    def _await_failure(self) -> dict | None:
        """The failure that a vanished peer recorded; it may still be on its way."""
        deadline = time.monotonic() + LAST_WORDS_SECONDS
        failure = None
        with contextlib.suppress(dist.DistError):
            while failure is None and time.monotonic() < deadline:
                failure = _read_failure(self.store)
                time.sleep(0.1)
        return failure

    def _watch(self) -> None:
        store, answered = None, time.monotonic()
        while not self._closing.wait(WATCH_SECONDS):
            try:
                store = store or open_store(self.launch, hosts=False, seconds=LOST_STORE_SECONDS / 4)
                failure = _read_failure(store)
                answered = time.monotonic()
            except (dist.DistError, MegakdError) as error:
                store, failure = None, None
                if time.monotonic() - answered > LOST_STORE_SECONDS and not self._closing.is_set():
                    what = f"the store at {self.launch.where} is gone (launcher or rank 0 killed?)"
                    self._leave(f"rank {self.launch.rank} stopped: {what}: {first_line(error)}")
            if failure is not None and failure["rank"] != self.launch.rank and not self._closing.is_set():
                self._leave(_stopped_by(failure, self.launch.rank))

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


def is_peer_loss(error: BaseException | None) -> bool:
    """True when this error, or what caused it, says that a connection to another rank broke."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if any(text in str(error) for text in PEER_LOST):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def first_line(error: BaseException) -> str:
    """The first line of a message that may have none, without gloo's advice."""
    return str(error).partition("\n")[0].partition(". This is typically")[0]


def _read_failure(store: dist.Store) -> dict | None:
    """{"rank": int, "error": str} of the first failure that any rank has recorded."""
    return json.loads(store.get("failure")) if store.check(["failure"]) else None


def _stopped_by(failure: dict, rank: int) -> str:
    return f"rank {rank} stopped: rank {failure['rank']} failed with {failure['error']}"
