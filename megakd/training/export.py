"""The end of a finished run: its student in another format, written by a process of its own.

A process of its own, because a conversion runs on a CPU, whatever the run uses, and its comparison of logits has a
process group of its own. It ends with rank 0, by a kill too; what it writes gets its name when all of it is written.
"""

import json
import logging
import multiprocessing
import pathlib
import signal
import sys
from multiprocessing.connection import Connection

from megakd.checkpoints.folder import step_folder
from megakd.config import Config
from megakd.converters.convert import Options, convert
from megakd.converters.direct import open_checkpoint
from megakd.converters.huggingface.exporting import origin
from megakd.converters.nemo.convert import check_expressible
from megakd.errors import CheckpointError, ConfigError
from megakd.processes import follow_parent
from megakd.publish import publish_text, remove
from megakd.ranks import Ranks, from_rank_0

LOG = logging.getLogger("megakd")
NAMES = {"hf": "huggingface", "nemo": "student.nemo"}  # in the run folder
EXPORT_FILE = "exported.json"  # which step was exported, once it was
TURN_SECONDS = 1.0  # between two questions whether the run was asked to stop
END_SECONDS = 10.0  # for the process to take away what it has begun


def check_export(config: Config) -> None:
    """Raises ConfigError where the student cannot be written in export.format; before anything is built.

    Rank 0 calls it. A Hugging Face folder that the student starts from is converted here, as it would be later.
    """
    if config.export.format is None:
        return
    if config.student.checkpoint is None:
        path, model = None, config.student.model
    else:
        start = open_checkpoint(config.student.checkpoint, config.checkpoint.verify, progress=config.log.progress)
        path, model = start.path, start.model
    model = model.model_copy(update={"vocab_size": model.vocab_size or 1024})  # the tokenizer's; nothing depends on it
    try:
        origin(model, path, None) if config.export.format == "hf" else check_expressible(model)
    except CheckpointError as error:
        raise ConfigError(f"export.format is {config.export.format}, but {error.args[0]}", hint=error.hint) from error


def forget_export(config: Config) -> None:
    """The run goes on, so that what was exported is no longer its end. Rank 0 calls it."""
    (pathlib.Path(config.run.dir) / EXPORT_FILE).unlink(missing_ok=True)


def export(config: Config, step: int, ranks: Ranks) -> bool:
    """Write the student of a step, unless that was done before.

    Returns:
        False where the run was asked to stop before it was written: the next launch writes it.
    Raises:
        CheckpointError: on every rank; the checkpoint, and an earlier export, are as they were.
    Collectives: an all-reduce and a broadcast of a few bytes, each second.
    """
    run_dir = pathlib.Path(config.run.dir)
    destination = run_dir / NAMES[config.export.format]
    said = {"format": config.export.format, "step": step}
    if from_rank_0(lambda: read_exported(run_dir) == said and destination.exists()):
        LOG.info("the student of step %d was exported before, to %s", step, destination)
        return True
    process = Exporting(config, step, destination) if ranks.is_main else None
    try:
        record = None
        while record is None:
            ranks.pulse.mark("export", step)
            if ranks.agree_to_stop():
                LOG.info("asked to stop while the student is exported; the same command exports it")
                return False
            record = from_rank_0(lambda: process.turn())
    finally:
        if process:
            process.end()
    from_rank_0(lambda: write_exported(run_dir, said))
    LOG.info("the student of step %d is in %s: %s", step, destination, describe(record))
    return True


def write_exported(run_dir: pathlib.Path, said: dict) -> None:
    try:
        publish_text(run_dir / EXPORT_FILE, json.dumps(said) + "\n")
    except OSError as error:
        raise CheckpointError(
            f"{run_dir / EXPORT_FILE} cannot be written: {error}",
            hint="free space on that disk; the same command exports the student again",
        ) from error


def read_exported(run_dir: pathlib.Path) -> dict | None:
    try:
        return json.loads((run_dir / EXPORT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def describe(record: dict) -> str:
    """Of a conversion's record: what it is and how it was verified."""
    verified = record["verified"]
    if isinstance(verified, dict):
        verified = f"largest difference of a logit {max(verified['differences']):.1e}"
    return f"{record['model_type']}, {verified}"


class Exporting:
    """A conversion under way in a process of its own."""

    def __init__(self, config: Config, step: int, destination: pathlib.Path):
        source = step_folder(config.run.dir, step)
        LOG.info("exporting %s to %s", source, destination)
        for stray in destination.parent.glob(".nemo-*"):  # what a kill has left of an archive that was being read
            remove(stray)
        options = Options(verify=config.export.verify, overwrite=True, progress=config.log.progress)
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe(duplex=False)
        self.process = context.Process(
            target=convert_and_tell, args=(theirs, source, destination, config.export.format, options)
        )
        self.process.start()
        theirs.close()

    def turn(self) -> dict | None:
        """Wait a moment; the record of the conversion once it is done.

        Raises:
            CheckpointError: that of the conversion, or its process died.
        """
        if not self.pipe.poll(TURN_SECONDS):
            return None
        try:
            said = self.pipe.recv()
        except EOFError:
            self.process.join()
            said = CheckpointError(
                f"the process that exports the student died (exit code {self.process.exitcode})",
                hint="exit code -9 is mostly a lack of memory; the same command exports it again",
            )
        self.process.join()
        if isinstance(said, CheckpointError):
            raise said
        return said

    def end(self) -> None:
        """End it, if it has not ended; what it has begun is taken away."""
        self.process.terminate()
        self.process.join(END_SECONDS)
        self.process.kill()
        self.process.join()


def convert_and_tell(pipe: Connection, source: pathlib.Path, destination: pathlib.Path, format: str, options) -> None:
    """The process: sends the record of the conversion, or its error."""
    follow_parent()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        pipe.send(convert(source, destination, format, options))
    except CheckpointError as error:
        pipe.send(CheckpointError(error.args[0], hint=error.hint))
    finally:
        pipe.close()
