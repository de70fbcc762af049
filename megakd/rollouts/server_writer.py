"""Servers that write in the student's place: its weights are exported, and the servers take them and are asked."""

import functools
import logging
import pathlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait

import torch.distributed as dist

from megakd.assembly.saving import export_student
from megakd.assembly.setup import Setup
from megakd.checkpoints.folder import run_id
from megakd.errors import TrainingError
from megakd.generation.engine import Request, Sequence
from megakd.generation.stops import Stops
from megakd.publish import remove
from megakd.ranks import from_rank_0
from megakd.rollouts.completions import Completions
from megakd.rollouts.http import Refused, Unreachable, call
from megakd.rollouts.kept import FOLDER
from megakd.rollouts.servers import FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, Servers

LOG = logging.getLogger("megakd")
ROUND_SECONDS = 1.0  # between two questions whether to stop


class ServerWriter:
    """Writes as `megakd.rollouts.writer.Writer`, by HTTP, from rank 0.

    Args:
        setup: of the run.
        stops: what ends a completion.
    Raises:
        TrainingError: on every rank; a server does not answer.
    Collectives: two broadcasts.
    """

    def __init__(self, setup: Setup, stops: Stops):
        self.setup, self.section, self.server = setup, setup.config.rollouts, setup.config.rollouts.server
        run_dir = pathlib.Path(setup.config.run.dir)
        own = run_dir / FOLDER / "weights"  # a folder for all runs has one for each
        folder = own
        if self.server.folder is not None:  # the same name on every rank, whatever its file system shows it yet
            folder = pathlib.Path(self.server.folder) / f"run_{from_rank_0(lambda: run_id(run_dir))}"
        self.folder = folder.absolute()
        model = from_rank_0(self.name_of_model)
        self.ask = Completions(self.section, stops, setup.student.shard.size, setup.config.run.seed, model).ask

    def name_of_model(self) -> str:
        """What requests call it, as the first server says that lists its models, within `dead_seconds`.

        Raises:
            TrainingError: none does.
        """
        urls = [url.rstrip("/") for url in self.server.urls]
        deadline, troubles = time.monotonic() + self.server.dead_seconds, {}
        while True:
            for url in urls:
                try:
                    answer = call(f"{url}/v1/models", seconds=self.server.dead_seconds / len(urls))
                    return self.server.served_name or answer["data"][0]["id"]
                except (Unreachable, Refused, LookupError, TypeError) as error:
                    troubles[url] = str(error)
            if time.monotonic() + LONGEST_PAUSE_SECONDS / 4 > deadline:
                break
            time.sleep(LONGEST_PAUSE_SECONDS / 4)
        raise TrainingError(
            f"no server of rollouts.server.urls has listed its models for {self.server.dead_seconds:g} s:\n"
            + "\n".join(f"  {url}: {trouble}" for url, trouble in troubles.items()),
            hint="are OpenAI-compatible servers running there?",
        )

    def write(self, requests: list[Request], step: int, stopping: Callable[[], bool]) -> list[Sequence] | None:
        """As `Writer`; the servers have the student's weights first.

        Raises:
            CheckpointError, TrainingError: on every rank.
        Collectives: those of saving weights, a broadcast and an all-reduce every second, at the end one of the pickled
            sequences.
        """
        path = self.folder / f"step_{step:08d}"
        export_student(path, self.setup, step)
        taken = self.give_weights(path, step, stopping)
        if taken is None:
            return None
        servers = Servers(
            taken, self.ask, lambda url: self.ask_to_reload(url, path),
            threads=self.section.concurrency, dead_seconds=self.server.dead_seconds,
        )  # fmt: skip
        with servers:
            from_rank_0(lambda: servers.begin(requests))
            while not from_rank_0(lambda: servers.wait(ROUND_SECONDS)):
                if stopping():
                    return None
            return from_rank_0(lambda: [servers.done[request] for request in requests])

    def give_weights(self, path: pathlib.Path, step: int, stopping: Callable[[], bool]) -> list[str] | None:
        """Have the servers take the exported student; the addresses of those that did, None when asked to stop.

        Older folders of this run go.
        """

        def give() -> list[str]:
            urls = [url.rstrip("/") for url in self.server.urls]
            reloads = [Background(functools.partial(self.reload, url, path)) for url in urls]
            troubles = [reload.result() for reload in reloads]
            for url, trouble in zip(urls, troubles, strict=True):
                if trouble is not None:
                    LOG.warning("%s did not take the weights of step %d, and writes nothing: %s", url, step, trouble)
            taken = [url for url, trouble in zip(urls, troubles, strict=True) if trouble is None]
            if not taken:
                raise TrainingError(
                    "no server of rollouts.server.urls took the student's weights:\n  " + "\n  ".join(troubles),
                    hint="start them again, then this run: it goes on from its last checkpoint",
                )
            for other in self.folder.glob("step_*"):
                if other != path:
                    remove(other)
            return taken

        giving = Background(give) if dist.get_rank() == 0 else None
        while not from_rank_0(lambda: giving.ends_within(ROUND_SECONDS)):
            if stopping():
                return None
        return from_rank_0(lambda: giving.result())

    def ask_to_reload(self, url: str, path: pathlib.Path) -> None:
        """The requests of rollouts.server.reload, in order; raises Unreachable or Refused."""
        for request in self.server.reload:
            body = filled(request.get("json", {}), str(path))
            call(url + request["path"], body, seconds=self.server.timeout_seconds)

    def reload(self, url: str, path: pathlib.Path) -> str | None:
        """Have one server take the weights of a folder; what was in the way, if it does not answer for too long.

        Raises:
            TrainingError: it refuses.
        """
        deadline, pause = time.monotonic() + self.server.dead_seconds, FIRST_PAUSE_SECONDS
        while True:
            try:
                self.ask_to_reload(url, path)
                return None
            except Refused as error:
                raise TrainingError(
                    f"rollouts.server.reload: {error}",
                    hint=f"does the server see {path}, and take weights so (docs/on-policy.md)?",
                ) from error
            except Unreachable as error:
                if time.monotonic() + pause > deadline:
                    return str(error)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


class Background:
    """A call in a thread that a process which ends does not wait for."""

    def __init__(self, work: Callable):
        self.future: Future = Future()
        threading.Thread(target=self._run, args=(work,), daemon=True).start()

    def _run(self, work: Callable) -> None:
        try:
            self.future.set_result(work())
        except Exception as error:  # raised again where the result is wanted
            self.future.set_exception(error)

    def ends_within(self, seconds: float) -> bool:
        wait([self.future], seconds)
        return self.future.done()

    def result(self):
        return self.future.result()


def filled(values, folder: str):
    """JSON with {folder} in its texts replaced."""
    if isinstance(values, dict):
        return {name: filled(value, folder) for name, value in values.items()}
    if isinstance(values, list):
        return [filled(value, folder) for value in values]
    return values.replace("{folder}", folder) if isinstance(values, str) else values
