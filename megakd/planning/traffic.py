"""Bytes that a rank sends in one optimizer step on each axis, by the definition of the collectives; none is measured.

A ring sends (n - 1) / n of a tensor for an all-gather or a reduce-scatter over n ranks, and twice that for an
all-reduce. See docs/parallelism.md for what each axis sends where.
"""

from megakd.config import Config, Model
from megakd.planning.gathered import GRADIENT_BYTES
from megakd.planning.memory import BYTES
from megakd.planning.parameters import Parameters, layers_of, widths

RECORD_BYTES = 40  # of a token in the loss, to each tensor parallel rank


def step_traffic(config: Config, student: Model, teacher: Model | None, mine: Parameters, dp: int, stage: int) -> dict:
    """Axis -> bytes sent by a rank of one pipeline stage; axes of one rank are left out.

    Args:
        teacher: one that runs; None without.
        mine: parameters of the student on that rank.
    """
    parallel, train = config.parallel, config.train
    size = BYTES[train.precision]
    number = train.global_batch_size // (train.micro_batch_size * dp)
    tokens = train.micro_batch_size * config.data.sequence_length // parallel.cp
    models = [(student, config.student.pipeline, parallel, size, 3 if train.recompute == "full" else 2, number)]
    if teacher:
        their_size, all_students = BYTES[config.teacher_train.precision], number * config.students_per_teacher
        models.append((teacher, config.teacher.pipeline, config.teacher_parallel, their_size, 1, all_students))
    sent = dict.fromkeys(("tp", "pp", "cp", "ep"), 0)
    for model, pipeline, layout, width, passes, times in models:
        layers = layers_of(model, layout, stage, pipeline)
        stream = tokens * model.hidden_size * width
        sent["tp"] += len(layers) * passes * 2 * 2 * share(layout.tp) * stream * times
        sent["cp"] += (
            len(layers) * passes * 2 * tokens * widths(model)[1] // layout.tp * width * (layout.cp - 1) * times
        )
        experts = sum(model.has_experts(layer) for layer in layers)
        if experts:
            sent["ep"] += experts * passes * 2 * model.moe.top_k * share(layout.ep) * stream * times
        ends = (stage > 0) + (stage < layout.pp - 1)
        both_ways = 1 if passes == 1 else 2  # half of the ends are receivers in each direction
        sent["pp"] += ends * both_ways / 2 * stream / (layout.tp if layout.sp else 1) * layout.vpp * times
    if stage == parallel.pp - 1:
        sent["tp"] += (parallel.tp - 1) * tokens * RECORD_BYTES * number * (2 if teacher else 1)
    alike = dp * parallel.cp
    gradients, weights = mine.total * GRADIENT_BYTES, mine.total * size
    sent["dp"] = share(alike) * (gradients + (weights if config.optimizer.distributed else gradients))
    return {axis: round(number) for axis, number in sent.items() if number > 0}


def share(ranks: int) -> float:
    """Of a tensor that a ring of so many ranks sends in a reduce-scatter or an all-gather."""
    return (ranks - 1) / ranks
