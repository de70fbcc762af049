"""What a launch is, in one line after its first step: sizes, tokens, memory, and how long it will take."""

import datetime

import torch
import torch.distributed as dist

from megakd.assembly.setup import Setup
from megakd.models.initialization import is_split
from megakd.planning.words import large
from megakd.teachers.online import OnlineTeacher
from megakd.teachers.several import SeveralTeachers
from megakd.training.optimizer import memory_peak_bytes


def overview(setup: Setup, steps_left: int, tokens: float, seconds: float) -> str:
    """The line.

    Args:
        steps_left: after the step that was just done.
        tokens: supervised ones in its global batch.
        seconds: that it took.
    Collectives: three all-reduces of 8 bytes, and two for each teacher that runs.
    """
    train, device = setup.config.train, setup.device
    sizes = [f"student {large(count_parameters(setup.student, setup.groups, device))} parameters"]
    several = isinstance(setup.teacher, SeveralTeachers)
    named = zip(setup.teacher.names, setup.teacher.teachers, strict=True) if several else [("", setup.teacher)]
    for name, teacher in named:
        if isinstance(teacher, OnlineTeacher):
            elsewhere = teacher.offload.host if teacher.offload else {}
            count = large(count_parameters(teacher.gpt, teacher.gpt.pg_collection, device, elsewhere))
            sizes.append(" ".join(("teacher", name, count) if name else ("teacher", count)))
    length = setup.config.data.sequence_length
    peak = torch.tensor(memory_peak_bytes(device), dtype=torch.int64, device=device)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    kind = "GPU memory" if device.type == "cuda" else "memory"
    return (
        f"{', '.join(sizes)}; a step is {train.global_batch_size:,} samples of up to {length:,} tokens, "
        f"{tokens:,.0f} supervised; {int(peak) / 1e9:.2f} GB of {kind} on the fullest rank; {seconds:.3g} s for this "
        f"step; {steps_left:,} to go: {spell(steps_left * seconds)} at its pace, and a first step is slow"
    )


def count_parameters(gpt, groups, device: torch.device, elsewhere: dict = {}) -> int:  # noqa: B006  only read
    """Of the whole model, its padded vocabulary included; a tied embedding counts once.

    Args:
        groups: the model's.
        elsewhere: copies of weights by parameter, where those are empty now.
    Collectives: two all-reduces of 8 bytes over the ranks of a model, without and with those its experts are among.
    """
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    for parameter in (parameter for chunk in gpt.chunks for parameter in chunk.parameters()):
        if not getattr(parameter, "allreduce", True):  # Megatron's mark of experts that are divided among ranks
            counts[1] += elsewhere.get(parameter, parameter).numel()
        elif (is_split(parameter) or groups.tp.rank() == 0) and not getattr(parameter, "shared", False):
            counts[0] += elsewhere.get(parameter, parameter).numel()
    for count, group in zip(counts, (groups.mp, groups.tp_ep_pp), strict=True):
        dist.all_reduce(count, group=group)
    return int(counts.sum())


def spell(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
