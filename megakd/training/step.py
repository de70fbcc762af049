"""One optimizer step: the teacher over all micro-batches, then the student's schedule, then the update.

Legend: S sequence, B micro-batch, H hidden, T supervised tokens of one micro-batch.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.config import Loss
from megakd.errors import TrainingError
from megakd.kernels import KDLoss
from megakd.losses import SUMS, means, means_by_name
from megakd.models.features import FeatureLoss
from megakd.models.forward_only import pipeline, schedule, streams
from megakd.models.gpt import GPT
from megakd.models.micro_batch import MicroBatch, forward
from megakd.models.routing import RoutingLosses
from megakd.teachers.lesson import Lesson, TeacherSource, no_lesson
from megakd.training.head_loss import HeadLoss
from megakd.training.megatron_fsdp import FullyShardedByMegatron
from megakd.training.phases import Phases
from megakd.training.stragglers import OwnSeconds


class BrokenBatch(TrainingError):
    """A batch whose loss or gradient would spoil the weights; it has changed nothing that `leave_out` does not undo."""


class Witness(Protocol):
    """Whoever wants to see what a step computes on the way."""

    def losses(self, micro_batch: MicroBatch, lesson: Lesson, losses: KDLoss) -> None:
        """Is given every micro-batch with what its teacher said and its tokens' losses, on the last stage."""

    def gradients(self, ddp: list[torch.nn.Module]) -> None:
        """Is given the student's stages, whose gradients are whole, before they are clipped and taken."""


@dataclasses.dataclass
class StudentStep:
    """Everything a step needs; calling it runs one.

    Attributes:
        gpt, ddp: the student, bare, and its stages on this rank in Megatron's data-parallel wrapper.
        teacher: None for plain training.
        features: distances between hidden states, None without.
        loss: the loss section; its ramps are followed step by step.
        optimizer, scheduler: Megatron's.
        groups: the run's process groups.
        own: this rank's own seconds of the last step.
        phases: where the seconds of a step go.
        routing: terms of the student's routers, None without experts.
    """

    gpt: GPT
    ddp: list[torch.nn.Module]
    teacher: TeacherSource | None
    features: FeatureLoss | None
    loss: Loss
    optimizer: object
    scheduler: object
    groups: object
    own: OwnSeconds = dataclasses.field(default_factory=OwnSeconds)
    phases: Phases = dataclasses.field(default_factory=Phases)
    routing: RoutingLosses | None = None

    def __post_init__(self):
        self.gpt.config.finalize_model_grads_func = self.own.before(self.gpt.config.finalize_model_grads_func)

    def __call__(
        self,
        micro_batches: list[MicroBatch],
        *,
        step: int,
        measure: bool,
        loss_limit: float = math.inf,
        check: Callable[[dict[str, float]], None] | None = None,
        witness: Witness | None = None,
    ) -> dict[str, float] | None:
        """Run one step.

        Args:
            micro_batches: this data-parallel rank's, in order.
            step: its number, for messages.
            measure: compute agreement and teacher CE too (one more read of both models' logits).
            loss_limit: a larger loss is a spike, and refused.
            check: is given the averages before the update, and may raise on every rank.
            witness: sees what is computed on the way.
        Returns:
            Averages over the supervised tokens of the global batch with learning rate and gradient norm, equal on all
            ranks; None for a batch without supervised tokens, which changes nothing.
        Raises:
            BrokenBatch: loss or gradient are not finite, or the loss is a spike; on every rank, before the update.
        Collectives: beside those of models and loss: one all-reduce of a count before, one of the sums after.
        """
        self.scheduler.step(increment=1)  # before the update: step 1 of a warm-up does not train at rate 0
        metrics = self.derive(
            micro_batches, step=step, measure=measure, loss_limit=loss_limit, check=check, witness=witness
        )
        if metrics is None:
            return None
        self.phases.begin("optimizer")
        self.optimizer.step()
        self.phases.begin("other")
        metrics["lr"] = self.optimizer.param_groups[0]["lr"]
        return metrics | self.loss.moved(step)

    def derive(
        self,
        micro_batches: list[MicroBatch],
        *,
        step: int,
        measure: bool,
        loss_limit: float = math.inf,
        check: Callable[[dict[str, float]], None] | None = None,
        witness: Witness | None = None,
    ) -> dict[str, float] | None:
        """All of a step but its update: as above, the gradients stay in the optimizer."""
        supervised = self.supervised_tokens(micro_batches)
        if supervised == 0:
            return None
        if self.routing:
            positions = sum(m.ids_BS.numel() for m in micro_batches) * self.groups.dp.size()
            self.routing.begin(supervised, positions)
        self.own.start()
        loss = self.loss.at(step)
        if self.teacher:
            self.phases.begin("teacher")
        if self.features:
            self.features.begin(micro_batches)
        lessons = self.lessons(micro_batches, loss, step)
        if self.features:
            self.features.end_teacher()
        self.phases.begin("student")
        for chunk in self.ddp:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = schedule(self.gpt, self.groups)(
            forward_step_func=functools.partial(self.forward_step, loss, measure, witness),
            data_iterator=streams(self.gpt, list(zip(micro_batches, lessons, strict=True))),
            model=self.ddp,
            num_microbatches=len(micro_batches),
            seq_length=micro_batches[0].ids_BS.shape[1],
            micro_batch_size=micro_batches[0].ids_BS.shape[0],
            forward_only=False,
            **pipeline(self.gpt, self.groups),
        )
        totals = reduce_sums(sums, self.groups, micro_batches[0].ids_BS.device, len(self.names))
        metrics = means(totals[0], self.teacher is not None) | means_by_name(totals, self.names)
        self.phases.begin("other")
        if self.features:
            metrics["features"] = self.features.sum() / metrics["tokens"]
            metrics["loss"] += metrics["features"]
        if self.routing and (added := self.routing.metrics()):
            metrics["loss"] += added.pop("loss")
            metrics |= added
        parts = [name for name in ("loss", "kd", "ce", "features", "balance", "router_z") if name in metrics]
        check_finite(metrics, parts, f"step {step}", BrokenBatch)
        if check:
            check(metrics)
        if metrics["loss"] > loss_limit:
            raise BrokenBatch(
                f"step {step}: loss = {metrics['loss']:.6g} is a spike: above train.spike_factor x the running median, "
                f"{loss_limit:.6g}",
                hint="look at the samples; to go on without such batches: train.max_skipped_steps=N",
            )
        self.phases.begin("optimizer")
        self.optimizer.prepare_grads()  # the norm first: once a step is taken with it, the weights are spoilt
        metrics["grad_norm"] = float(self.optimizer.get_grad_norm())
        self.phases.begin("other")
        check_finite(metrics, ["grad_norm"], f"step {step}", BrokenBatch)
        if witness:
            witness.gradients(self.ddp)
        return metrics

    @property
    def names(self) -> list[str]:
        """Of teachers that have some."""
        return getattr(self.teacher, "names", [])

    def leave_out(self) -> None:
        """After a BrokenBatch: undo what the reduction of gradients has moved (biases that choose experts)."""
        if self.routing:
            self.routing.leave_out()

    def supervised_tokens(self, micro_batches: list[MicroBatch]) -> int:
        """Supervised tokens of the global batch."""
        count = torch.tensor(sum(len(m.labels_T) for m in micro_batches), device=micro_batches[0].ids_BS.device)
        dist.all_reduce(count, group=self.groups.dp_cp)
        return int(count)

    def lessons(self, micro_batches: list[MicroBatch], loss: Loss, step: int) -> list[Lesson | None]:
        if self.teacher is None:
            return [no_lesson(len(m.labels_T), m.ids_BS.device) for m in micro_batches]
        if self.loss.ramps.temperature is not None:
            self.teacher.temperature = loss.temperature  # only a live teacher may have a ramp
        lessons = self.teacher.lessons(micro_batches, step)
        return lessons or [None] * len(micro_batches)  # there are none on earlier pipeline stages

    def forward_step(self, loss: Loss, measure: bool, witness: Witness | None, iterator, model):
        micro_batch, lesson = next(iterator)
        keep = functools.partial(witness.losses, micro_batch, lesson) if witness else None
        tokens, compared = micro_batch.labels_BS.numel() // self.groups.cp.size(), measure and self.teacher is not None
        head = HeadLoss(self.gpt, micro_batch, lesson, loss, tokens, compared, keep, len(self.names))
        if isinstance(model, FullyShardedByMegatron):
            head = model.announced(head)
        return forward(model, micro_batch), head


def reduce_sums(sums: list[Tensor], groups, device, teachers: int = 0) -> Tensor:
    """Add up the micro-batches' sums over data-parallel ranks, and give them to all pipeline stages.

    Args:
        teachers: with names; each has a row of sums below that of all.

    Collectives: one all-reduce over dp on the last stage, one broadcast over pp when there is more than one stage.
    """
    total = (
        torch.stack(sums).sum(0) if sums else torch.zeros(1 + teachers, len(SUMS), dtype=torch.float64, device=device)
    )
    if sums:
        dist.all_reduce(total, group=groups.dp_cp)
    if groups.pp.size() > 1:
        dist.broadcast(total, group=groups.pp, group_src=groups.pp.size() - 1)
    return total


def check_finite(
    metrics: dict[str, float], names: list[str], where: str, error: type[TrainingError] = TrainingError
) -> None:
    wrong = {name: metrics[name] for name in names if not math.isfinite(metrics[name])}
    if wrong:
        values = ", ".join(f"{name} = {value}" for name, value in wrong.items())
        raise error(
            f"{where}: {values} (not finite); nothing of it is saved",
            hint="lower optimizer.lr, lengthen schedule.warmup_steps, or look at the samples of this step; "
            "the last checkpoint is from before it",
        )
