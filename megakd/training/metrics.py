"""Where numbers go: metrics.jsonl always; progress bar, TensorBoard and Weights & Biases when asked for."""

import contextlib
import importlib.util
import json
import logging
import os
import pathlib
import time
import uuid
from collections.abc import Iterator

from megakd.config import Config
from megakd.errors import ConfigError, TrainingError
from megakd.progress import progress_bar
from megakd.publish import publish_text

LOG = logging.getLogger("megakd")
METRICS_FILE = "metrics.jsonl"
SHOWN = {"loss": ("loss", ".4g"), "kd": ("kd", ".4g"), "ce": ("ce", ".4g"), "agreement": ("agree", ".1%"),
         "tokens_per_second": ("tok/s", ",.0f")}  # fmt: skip


class MetricsLog:
    """Writes one line per logged step; only rank 0 has one that does anything.

    Args:
        config: the run's.
        step: steps already done: later lines of an interrupted launch are dropped, for they will be written again.
        steps: the run's last step.
        enabled: False on all ranks but 0.
    """

    def __init__(self, config: Config, step: int, steps: int, enabled: bool):
        self.enabled, self.board, self.wandb = enabled, None, None
        if not enabled:
            return
        if config.log.wandb_project:  # before anything is opened: it is the one that refuses
            self.wandb = start_wandb(config)
        run_dir = pathlib.Path(config.run.dir)
        self.path = run_dir / METRICS_FILE
        try:
            drop_lines_after(self.path, step)
            self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  closed in close()
        except OSError as error:
            raise self.unwritable(error) from error
        self.bar = progress_bar(steps, start=step, shown=config.log.progress)
        if config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def write(self, kind: str, step: int, metrics: dict) -> None:
        """kind: `train` or `validation`; becomes a field of the line and the prefix elsewhere, where numbers go."""
        if not self.enabled:
            return
        try:
            self.file.write(json.dumps({"kind": kind, "step": step, **metrics}) + "\n")
            self.file.flush()
        except OSError as error:
            raise self.unwritable(error) from error
        named = {f"{kind}/{name}": value for name, value in metrics.items() if isinstance(value, int | float)}
        if self.board:
            for name, value in named.items():
                self.board.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(named, step=step)
        if kind == "validation":
            LOG.info("step %d: validation %s", step, show(metrics))

    def sync(self) -> None:
        """Return when what was written is on the disk, so that no line of a saved step is lost with the power."""
        if self.enabled:
            try:
                os.fsync(self.file.fileno())
            except OSError as error:
                raise self.unwritable(error) from error

    def unwritable(self, error: OSError) -> TrainingError:
        return TrainingError(
            f"{self.path} cannot be written: {error}",
            hint="free space on that disk, or make it writable, then start the run again",
        )

    def advance(self, metrics: dict[str, float] | None) -> None:
        """One step is done; its metrics, if it has any, are shown beside the bar."""
        if self.enabled:
            if metrics:
                self.bar.set_postfix_str(show(metrics), refresh=False)
            self.bar.update()

    def close(self) -> None:
        if self.enabled:
            self.bar.close()
            self.file.close()
            if self.board:
                self.board.close()
            if self.wandb:
                self.wandb.finish()


def show(metrics: dict[str, float]) -> str:
    """The numbers that matter, the most important first."""
    return " ".join(f"{label} {metrics[name]:{form}}" for name, (label, form) in SHOWN.items() if name in metrics)


def check_sinks(config: Config) -> None:
    """Raises ConfigError where metrics are to go to a package that is not installed; before anything is built."""
    if config.log.wandb_project and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"log.wandb_project = {config.log.wandb_project!r}, but the package wandb is not installed",
            hint='pip install "megakd[wandb]", or leave log.wandb_project out',
        )


def start_wandb(config: Config):
    import wandb

    run_dir, log = pathlib.Path(config.run.dir), config.log
    kept = run_dir / "wandb_id.txt"  # the run's own: folders of other experiments may have the same name
    if not kept.exists():
        publish_text(kept, uuid.uuid4().hex[:12])
    identity = kept.read_text(encoding="utf-8")
    try:
        return wandb.init(
            project=log.wandb_project, entity=log.wandb_entity, group=log.wandb_group, tags=log.wandb_tags or None,
            name=run_dir.name, id=identity, resume="allow", config=config.model_dump(),
        )  # fmt: skip
    except wandb.Error as error:
        raise ConfigError(
            f"log.wandb_project = {log.wandb_project!r}, but Weights & Biases refuses: {error}",
            hint="`wandb login`, or WANDB_MODE=offline in the environment",
        ) from error


def has_line(path: pathlib.Path, kind: str, step: int) -> bool:
    """Whether the metrics file has a whole line of this kind and step."""
    return any((entry.get("kind"), entry["step"]) == (kind, step) for _, entry in read_lines(path))


def read_lines(path: pathlib.Path) -> Iterator[tuple[str, dict]]:
    """The lines of a metrics file with their values; what is none (cut off by a kill, damaged) is left out."""
    for content in path.read_bytes().split(b"\n") if path.exists() else ():
        with contextlib.suppress(ValueError, RecursionError):
            line = content.decode("utf-8")
            entry = json.loads(line)
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                yield line + "\n", entry


def drop_lines_after(path: pathlib.Path, step: int) -> None:
    """Keep the lines up to a step; what is no line of metrics (one cut off by a kill, a damaged one) goes too."""
    if not path.exists():
        return
    whole = list(read_lines(path))
    if (others := len([line for line in path.read_bytes().split(b"\n")[:-1] if line.strip()]) - len(whole)) > 0:
        LOG.warning("%s: %d damaged lines are left out", path, others)
    publish_text(path, "".join(line for line, entry in whole if entry["step"] <= step))


class Stopwatch:
    """Seconds of the parts of a step, on the host's clock; the step's own reductions make it wait for the device."""

    def __init__(self):
        self.start = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self.start = now - self.start, now
        return seconds
