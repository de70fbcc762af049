"""A trace of some steps: operation by operation, and on CUDA what memory is used for."""

import gzip
import logging
import pathlib
import shutil

import torch
from torch.profiler import ProfilerActivity, profile

from megakd.config import Config
from megakd.publish import make_folder, publishing

LOG = logging.getLogger("megakd")
FOLDER = "profile"  # in the run folder
MEMORY_EVENTS = 100_000


class Tracer:
    """Traces the steps of log.profile on this rank, if it is one of those.

    What cannot be written is a warning: a run does not end because of it.
    """

    def __init__(self, config: Config, rank: int, device: torch.device):
        section = config.log.profile
        self.rank, self.cuda, self.running = rank, device.type == "cuda", None
        self.first, self.last = (0, 0) if section is None else section.steps
        self.mine = section is not None and (section.ranks is None or rank in section.ranks)
        self.folder = pathlib.Path(config.run.dir) / FOLDER / f"steps_{self.first}_{self.last}"

    def before(self, step: int) -> None:
        """A step begins."""
        if self.mine and self.running is None and self.first <= step <= self.last:
            activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self.cuda else [])
            self.running = profile(activities=activities, profile_memory=True)
            if self.cuda:
                torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
            self.running.start()

    def ends_with(self, step: int) -> bool:
        """Whether this is the last of the steps; the same on every rank, traced or not."""
        return step == self.last

    def close(self) -> None:
        """Write what was traced, if anything was."""
        if self.running is None:
            return
        running, self.running = self.running, None
        running.stop()
        try:
            make_folder(self.folder)
            with publishing(self.folder / f"rank_{self.rank:05d}.json.gz") as partial:
                write_trace(running, partial)
            if self.cuda:
                with publishing(self.folder / f"rank_{self.rank:05d}.memory.pickle") as partial:
                    torch.cuda.memory._dump_snapshot(str(partial))
        except OSError as error:
            LOG.warning("the profile of steps %d to %d is not written: %s", self.first, self.last, error)
        else:
            LOG.info("the profile of steps %d to %d is in %s", self.first, self.last, self.folder)
        finally:
            if self.cuda:
                torch.cuda.memory._record_memory_history(enabled=None)


def write_trace(running: profile, path: pathlib.Path) -> None:
    """The events as compressed JSON, whatever the file is called; torch itself compresses by the ending of a name."""
    plain = path.with_name(f"{path.name}.plain")
    try:
        running.export_chrome_trace(str(plain))
        with open(plain, "rb") as source, gzip.open(path, "wb", compresslevel=5) as target:
            shutil.copyfileobj(source, target)
    finally:
        plain.unlink(missing_ok=True)
