"""What a training checkpoint holds, when old ones go, and how a run continues from one."""

import dataclasses
import logging
import pathlib
import time

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megakd.checkpoints import folder, torch_dist
from megakd.checkpoints.folder import Checkpoint
from megakd.config import Config, Model
from megakd.data.sources import order_version
from megakd.digests import FileDigests
from megakd.errors import CheckpointError, DamagedCheckpointError
from megakd.models.groups import layout
from megakd.models.sharding import is_sharded
from megakd.stopped import write_stopped
from megakd.training.fallback import older_checkpoint
from megakd.training.fully_sharded import describe_state, take_state
from megakd.training.optimizer_state import check_kind, check_master_weights, fit_optimizer_state, share_steps
from megakd.training.run_folder import check_owner
from megakd.training.step import StudentStep

LOG = logging.getLogger("megakd")
# What the data section says about how a sample is written; it belongs to the model as its tokenizer does.
SAMPLE_KEYS = {
    "format",
    "columns",
    "template",
    "chat_template",
    "chat_template_kwargs",
    "chat_tokens",
    "answer_only_loss",
    "add_bos",
    "add_eos",
}


@dataclasses.dataclass
class Progress:
    """What a run has done so far; plain numbers, saved with every checkpoint.

    Attributes:
        step: optimizer steps, skipped ones included; with the seed it is the data position.
        tokens: supervised tokens seen.
        skipped: steps without supervised tokens.
        broken: steps left out because their batch would have spoilt the weights.
        recent: losses of the last steps, for what counts as a spike.
        best_loss, best_step: lowest validation loss and where.
    """

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    broken: int = 0
    recent: list[float] = dataclasses.field(default_factory=list)
    best_loss: float | None = None
    best_step: int | None = None


class Saver:
    """Saves a run's checkpoints and removes old ones.

    Args:
        student: whose weights, optimizer, scheduler and random states are saved.
        model: the student's model section, written into the folder.
        tokenizer: travels along.
        origin: the checkpoint that the student started from; what it kept of its origin travels along too.
        saved_step: of the checkpoint that this launch continues from.
    """

    def __init__(
        self,
        config: Config,
        student: StudentStep,
        model: Model,
        tokenizer,
        origin: pathlib.Path | None = None,
        saved_step: int | None = None,
    ):
        self.config, self.student, self.model, self.tokenizer = config, student, model, tokenizer
        self.pending: torch_dist.PendingSave | None = None
        self.saved_step = saved_step
        self.origin = origin

    def save(self, progress: Progress, metrics: dict[str, float]) -> None:
        """Write a checkpoint of this step, unless it was just written.

        Raises:
            CheckpointError: on every rank; earlier checkpoints are untouched.
        """
        if self.saved_step == progress.step:
            return
        self.finish()
        path = folder.step_folder(self.config.run.dir, progress.step)
        state = training_state(self.student, loading=False)
        sizes = layout(self.student.groups)
        state |= {"progress": dataclasses.asdict(progress), "layout": sizes}
        step, best_step = progress.step, progress.best_step  # a background save is published later
        began = time.monotonic()

        def publish(written: dict[str, FileDigests]):
            parts = {"model": self.model, "step": step, "training": True, "metrics": metrics, "layout": sizes}
            check_owner(self.config.run.dir)
            parts["run"] = folder.run_id(pathlib.Path(self.config.run.dir))
            data = self.config.data.model_dump(include=SAMPLE_KEYS) | {"order": order_version(self.config.data)}
            folder.publish(path, tokenizer=self.tokenizer, origin=self.origin, data=data, written=written, **parts)
            self.prune(best_step)
            size = sum(digests.size_bytes for digests in written.values()) / 1e9
            how = "" if held is None else f", in {held:.1f} s of which no step was taken"
            LOG.info("checkpoint of step %d: %.3g GB in %.1f s%s", step, size, time.monotonic() - began, how)

        held = None
        self.pending = torch_dist.save(
            path, state, self.student.groups, publish, asynchronous=self.config.checkpoint.asynchronous
        )
        held = time.monotonic() - began  # for the copy; a background save is published after this
        self.saved_step = progress.step

    def prune(self, best_step: int | None) -> None:
        """Remove what is neither among the last, nor the best, nor kept for good; on rank 0 alone."""
        section = self.config.checkpoint

        def keep(step: int) -> bool:
            if section.keep_every and step % section.keep_every == 0:
                return True
            return section.keep_best and step == best_step

        folder.prune(self.config.run.dir, section.keep_last, keep)

    def poll(self) -> None:
        """Publish a background save that has been written."""
        if self.pending is not None and self.pending.is_written():
            self.finish()

    def finish(self) -> None:
        """Wait for a background save, and publish it.

        Raises:
            CheckpointError: on every rank; earlier checkpoints are untouched.
        """
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.complete()

    def add_metrics(self, progress: Progress, metrics: dict[str, float]) -> None:
        """Put metrics of the step that was just saved into its record, and remove the one that was best before."""
        self.finish()
        if dist.get_rank() == 0:
            folder.record_metrics(folder.step_folder(self.config.run.dir, self.saved_step), metrics)
            self.prune(progress.best_step)


def training_state(student: StudentStep, *, loading: bool, with_random: bool = True) -> dict:
    gpt, groups = student.gpt, student.groups
    weights = torch_dist.describe_weights(gpt, groups, in_place=loading)
    if is_sharded(gpt):
        optimizer = describe_state(student.ddp[0], student.optimizer, groups, loading=loading)
    else:
        metadata = torch_dist.sharding_metadata(groups)
        optimizer = student.optimizer.sharded_state_dict(weights, is_loading=loading, metadata=metadata)
    state = {"model": weights, "optimizer": share_steps(optimizer)}
    if with_random:
        state["random"] = random_state(student.groups)
    return state


def random_state(groups) -> ShardedObject:
    """Every rank's own random states (dropout), at its place in (pp, tp, dp)."""
    state = {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    axes = (groups.pp, groups.tp, groups.dp_cp)
    return ShardedObject("random", state, tuple(g.size() for g in axes), tuple(g.rank() for g in axes), replica_id=0)


def resume_newest(student: StudentStep, checkpoint: Checkpoint, config: Config) -> Progress:
    """Continue from a checkpoint; from the newest whole one before it, if it turns out to be damaged.

    Raises:
        CheckpointError: on every rank; none is whole, or run.resume is newest_only.
    Collectives: those of `resume`, and one broadcast for each damaged checkpoint.
    """
    while True:
        try:
            progress = resume(student, checkpoint)
            LOG.info("continuing from %s", checkpoint.path)
            return progress
        except DamagedCheckpointError as error:
            checkpoint = older_checkpoint(config, checkpoint, error)


def set_random_state(state, checkpoint: Checkpoint) -> None:
    """Continue the random numbers where random_state found them.

    Raises:
        CheckpointError: it is none.
    """
    try:
        torch.set_rng_state(state["torch"])
        torch.cuda.set_rng_state(state["device"])
        tracked = {str(name): value.to(torch.uint8) for name, value in state["tracker"].items()}
        tensor_parallel.get_cuda_rng_tracker().set_states(tracked)
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{checkpoint.path} holds no random state of a rank: {type(error).__name__}: {str(error)[:200]}",
            hint="it is damaged, or was not written by megakd; `student.checkpoint` takes its weights alone",
        ) from error


def resume(student: StudentStep, checkpoint: Checkpoint) -> Progress:
    """Continue exactly where a checkpoint was saved: to the bit on the same layout, to rounding on another.

    On another layout the random states of dropout start anew from the seed.
    """
    saved = torch_dist.common_values(checkpoint)
    try:
        same_layout, progress = saved["layout"] == layout(student.groups), Progress(**saved["progress"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint.path} does not say how far its run came: {type(error).__name__}: {error}",
            hint="is it a checkpoint of a run of megakd? `student.checkpoint` starts anew from its weights",
        ) from error
    wanted = training_state(student, loading=True, with_random=same_layout)
    described = wanted["optimizer"]
    check_kind(described, saved.get("optimizer", {}), checkpoint)
    loaded = torch_dist.load(checkpoint, wanted, student.groups)
    torch_dist.set_weights(student.gpt, loaded["model"], wanted["model"])
    optimizer = fit_optimizer_state(loaded["optimizer"], described, saved.get("optimizer", {}), checkpoint)
    if is_sharded(student.gpt):
        take_state(student.ddp[0], student.optimizer, student.groups, described, optimizer, checkpoint)
    else:
        check_master_weights(student.optimizer, optimizer, checkpoint)
        student.optimizer.load_state_dict(optimizer)
    student.scheduler.num_steps = 0
    student.scheduler.step(increment=progress.step)
    if same_layout:
        set_random_state(loaded["random"], checkpoint)
    measured = checkpoint.metrics.get("loss")  # may have been added after the state was saved
    if measured is not None and (progress.best_loss is None or measured < progress.best_loss):
        progress.best_loss, progress.best_step = measured, progress.step
    return progress


def write_stop_file(run_dir: str, step: int, *, finished: bool) -> None:
    """Say in `stopped.json` how far the run came.

    Collectives: one barrier, after the file is there.
    """
    if dist.get_rank() == 0:
        write_stopped(run_dir, step=step, finished=finished)
    dist.barrier()
