"""The bytes that a training step holds at most, measured on every rank."""

import torch

from tests.training import small


def measured(rank, ranks, axes, changes, student, teacher):
    """(stage, bytes between steps, most bytes within one, what they were) of a rank; every token is supervised.

    Args:
        axes: parallel section.
        changes: of small.config.
        student, teacher: changes of its model sections; teacher None: there is none.
    """
    from tests.planning.live_bytes import LiveBytes

    config = config_of(axes, changes, student, teacher)
    sizes = {name: axes[name] for name in ("cp", "ep") if name in axes}
    with LiveBytes() as live, small.layout(axes.get("tp", 1), axes.get("pp", 1), **sizes) as groups:
        step = small.student_step(config, groups, teacher is not None, teacher, **student)
        parts = batches(config, groups)
        for number in range(3):
            step(parts, step=number + 1, measure=True)
            between = live.now
            if number == 1:
                live.peak = 0
        return groups.pp.rank(), between, live.peak, sorted(live.at_peak, reverse=True)[:60]


def config_of(axes, changes, student, teacher):
    values = {f"parallel__{axis}": size for axis, size in axes.items()} | changes
    config = small.config(**values, student__model=small.student_section(**student))
    return config if teacher else config.model_copy(update={"teacher": None})


def batches(config, groups):
    from megakd.models.micro_batch import MicroBatch

    train, length = config.train, config.data.sequence_length
    number = train.global_batch_size // (train.micro_batch_size * groups.dp.size())
    ids = torch.randint(0, small.VOCAB, (number, train.micro_batch_size, length + 1))
    cut = (groups.cp.rank(), groups.cp.size())
    return [MicroBatch(part[:, :-1].contiguous(), part[:, 1:].contiguous(), cut=cut) for part in ids]
