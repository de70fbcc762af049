"""Servers that write in the student's place: its weights are exported, and the servers take them and are asked."""

import logging
import pathlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from megakd.assembly.saving import export_student
from megakd.assembly.setup import Setup
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
    Collectives: one broadcast.
    """

    def __init__(self, setup: Setup, stops: Stops):
        self.setup, self.section, self.server = setup, setup.config.rollouts, setup.config.rollouts.server
        folder = self.server.folder or pathlib.Path(setup.config.run.dir) / FOLDER / "weights"
        self.folder = pathlib.Path(folder).absolute()
        model = from_rank_0(self.name_of_model)
        self.ask = Completions(self.section, stops, setup.student.shard.size, setup.config.run.seed, model).ask

    def name_of_model(self) -> str:
        """What requests call it; every server has been asked."""
        names = []
        for url in self.server.urls:
            try:
                answer = call(f"{url.rstrip('/')}/v1/models", seconds=self.server.dead_seconds)
                names.append(answer["data"][0]["id"])
            except (Unreachable, Refused, LookupError, TypeError) as error:
                raise TrainingError(
                    f"rollouts.server.urls: {url} does not list its models: {error}",
                    hint="is an OpenAI-compatible server running there?",
                ) from error
        return self.server.served_name or names[0]

    def write(self, requests: list[Request], step: int, stopping: Callable[[], bool]) -> list[Sequence] | None:
        """As `Writer`; the servers have the student's weights first.

        Raises:
            CheckpointError, TrainingError: on every rank.
        Collectives: those of saving weights, a broadcast and an all-reduce every second, at the end one of the pickled
            sequences.
        """
        servers = Servers(
            self.give_weights(step), self.ask, threads=self.section.concurrency, dead_seconds=self.server.dead_seconds
        )
        with servers:
            from_rank_0(lambda: servers.begin(requests))
            while not from_rank_0(lambda: servers.wait(ROUND_SECONDS)):
                if stopping():
                    return None
            return from_rank_0(lambda: [servers.done[request] for request in requests])

    def give_weights(self, step: int) -> list[str]:
        """Export the student and have the servers take it; the addresses of those that did. Older folders go."""
        path = self.folder / f"step_{step:08d}"
        export_student(path, self.setup, step)

        def give() -> list[str]:
            urls = [url.rstrip("/") for url in self.server.urls]
            with ThreadPoolExecutor(len(urls)) as threads:
                troubles = list(threads.map(lambda url: self.reload(url, path), urls))
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

        return from_rank_0(give)

    def reload(self, url: str, path: pathlib.Path) -> str | None:
        """Have one server take the weights of a folder; what was in the way, if it does not answer for too long.

        Raises:
            TrainingError: it refuses.
        """
        calls = [(request["path"], filled(request.get("json", {}), str(path))) for request in self.server.reload]
        deadline, pause = time.monotonic() + self.server.dead_seconds, FIRST_PAUSE_SECONDS
        while True:
            try:
                for name, body in calls:
                    call(url + name, body, seconds=self.server.timeout_seconds)
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


def filled(values, folder: str):
    """JSON with {folder} in its texts replaced."""
    if isinstance(values, dict):
        return {name: filled(value, folder) for name, value in values.items()}
    if isinstance(values, list):
        return [filled(value, folder) for value in values]
    return values.replace("{folder}", folder) if isinstance(values, str) else values
