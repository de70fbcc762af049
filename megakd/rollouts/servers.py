"""Completions from several servers at once: threads that ask, a watch on who still answers, nobody lost on the way.

A server that does not answer is asked again, after pauses that double. One is left that for `dead_seconds` has not even
said that it is well, or has failed at everything it was asked; what it was asked goes to the others.
"""

import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable

from megakd.errors import TrainingError
from megakd.generation.engine import Request, Sequence
from megakd.rollouts.http import Refused, Unreachable, call

LOG = logging.getLogger("megakd")
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.25, 8.0
HEALTH = "/health"  # of vLLM and SGLang; a server that knows no such path answers so, and is alive


@dataclasses.dataclass
class Server:
    """One of them.

    Attributes:
        url: without /v1.
        well: when it last said that it was (time.monotonic).
        failing: since when it has failed at what it was asked; None where the last was answered.
        trouble: what was seen last.
        dead: it was given up.
        asked: requests that it has been given and not answered.
        renew: it was gone for a moment, and may have come back with the weights that it was started with.
        renewing: held while it is given the run's.
    """

    url: str
    well: float
    failing: float | None = None
    trouble: str = "no answer"
    dead: bool = False
    asked: set[Request] = dataclasses.field(default_factory=set)
    renew: bool = False
    renewing: threading.Lock = dataclasses.field(default_factory=threading.Lock)


class Servers:
    """Gets requests answered; to be used in a `with` block by one process.

    Args:
        urls: of the servers.
        ask: makes a sequence of a request at a server; raises Unreachable or Refused.
        renew: gives a server that was gone the weights again; raises likewise.
        threads: requests under way at each.
        dead_seconds: after which a server counts as dead.
    """

    def __init__(
        self,
        urls: list[str],
        ask: Callable[[str, Request], Sequence],
        renew: Callable[[str], None],
        *,
        threads: int,
        dead_seconds: float,
    ):
        self.ask, self.renew, self.threads, self.dead_seconds = ask, renew, threads, dead_seconds
        self.servers = [Server(url.rstrip("/"), time.monotonic()) for url in urls]
        self.todo: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self.done: dict[Request, Sequence] = {}
        self.wanted, self.lock = 0, threading.Lock()
        self.failure: Exception | None = None
        self.over = threading.Event()

    def __enter__(self) -> "Servers":
        return self

    def __exit__(self, *_) -> None:
        self.over.set()  # threads that wait for an answer end with it, or with the process

    def begin(self, requests: list[Request]) -> None:
        """Ask for these."""
        self.wanted = len(requests)
        for request in requests:
            self.todo.put(request)
        for server in self.servers:
            server.well, server.failing = time.monotonic(), None
            for _ in range(min(self.threads, len(requests))):
                threading.Thread(target=self._serve, args=(server,), daemon=True).start()
            threading.Thread(target=self._watch, args=(server,), daemon=True).start()

    def wait(self, seconds: float) -> bool:
        """Whether everything is answered, at the latest after so many seconds.

        Raises:
            TrainingError: a server refuses or answers something else, or all are dead.
        """
        deadline = time.monotonic() + seconds
        while len(self.done) < self.wanted and time.monotonic() < deadline:
            if isinstance(self.failure, Refused):
                raise TrainingError(f"rollouts.server: {self.failure}", hint="docs/on-policy.md says what is asked")
            if self.failure is not None:
                raise self.failure
            if all(server.dead for server in self.servers):
                raise all_dead(self.servers, self.dead_seconds)
            time.sleep(0.01)
        return len(self.done) == self.wanted

    def _serve(self, server: Server) -> None:
        pause = FIRST_PAUSE_SECONDS
        while not (self.over.is_set() or server.dead or len(self.done) == self.wanted):
            try:
                request = self.todo.get(timeout=0.05)
            except queue.Empty:
                continue
            with self.lock:
                if server.dead:
                    return self.todo.put(request)
                server.asked.add(request)
            try:
                self._have_weights(server)
                sequence = self.ask(server.url, request)
            except Unreachable as error:
                server.renew |= error.gone
                self._give_back(server, request)
                self._failed(server, str(error))
                self.over.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            except Exception as error:  # raised again where somebody waits
                self.failure = error
                return
            else:
                pause, server.failing = FIRST_PAUSE_SECONDS, None
                with self.lock:
                    server.asked.discard(request)
                    self.done[request] = sequence

    def _have_weights(self, server: Server) -> None:
        """Give them to a server that was gone, once; whoever else would ask it waits."""
        with server.renewing:
            if server.renew:
                LOG.warning("%s was gone (%s), and is given the weights again", server.url, server.trouble)
                server.renew = False
                try:
                    self.renew(server.url)
                except Unreachable:
                    server.renew = True
                    raise

    def _failed(self, server: Server, trouble: str) -> None:
        now = time.monotonic()
        server.trouble, server.failing = trouble, server.failing or now
        if now - server.failing > self.dead_seconds:
            self._give_up(server)

    def _give_up(self, server: Server) -> None:
        with self.lock:
            known, server.dead = server.dead, True
        if not known:
            others = sum(not other.dead for other in self.servers)
            LOG.warning("%s is dead: %s; %d other servers go on", server.url, server.trouble, others)
        for request in list(server.asked):
            self._give_back(server, request)

    def _give_back(self, server: Server, request: Request) -> None:
        """Let another thread have a request, unless that was done already."""
        with self.lock:
            if request in server.asked:
                server.asked.discard(request)
                self.todo.put(request)

    def _watch(self, server: Server) -> None:
        """Ask now and then whether a server is well; give it up when it has not said so for too long."""
        while not (self.over.wait(self.dead_seconds / 8) or server.dead or len(self.done) == self.wanted):
            try:
                with contextlib.suppress(Refused):
                    call(server.url + HEALTH, seconds=self.dead_seconds / 4)
                server.well = time.monotonic()
            except Unreachable as error:
                server.trouble, server.renew = str(error), server.renew or error.gone
            if time.monotonic() - server.well > self.dead_seconds:
                self._give_up(server)


def all_dead(servers: list[Server], seconds: float) -> TrainingError:
    seen = "\n".join(f"  {server.url}: {server.trouble}" for server in servers)
    return TrainingError(
        f"no server of rollouts.server.urls has answered for {seconds:g} s:\n{seen}",
        hint="start them again, then this run: it goes on from its last checkpoint",
    )
