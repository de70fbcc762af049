"""What of a layout contradicts the rest of a config, before models or ranks are known."""

from collections.abc import Iterator


def layout_problems(config) -> Iterator[tuple[str, str]]:
    """Yields (dotted key, what is wrong)."""
    parallel = config.parallel
    if parallel.sp and parallel.tp == 1:
        yield "parallel.sp", "true, but parallel.tp is 1; sequence parallel cuts what tensor parallel ranks share"
    if parallel.vpp > 1 and parallel.pp == 1:
        yield "parallel.vpp", f"{parallel.vpp}, but parallel.pp is 1; layers go round the ranks of a pipeline"
    if parallel.vpp > 1 and config.features is not None:
        yield "features", "given with parallel.vpp; the pair of a layer is then on another rank, expected vpp = 1"
    yield from fsdp_problems(config)
    if config.teacher is not None and config.teacher.parallel is not None:
        yield from teacher_problems(config)


def fsdp_problems(config) -> Iterator[tuple[str, str]]:
    parallel = config.parallel
    if parallel.fsdp == "both" and parallel.pp > 1:
        yield (
            "parallel.fsdp",
            f"both, but parallel.pp = {parallel.pp} interleaves the forward and backward passes of micro-batches, "
            "between which FSDP keeps weights gathered; expected teacher, or pp = 1",
        )
    if parallel.fsdp != "off" and parallel.ep > 1:
        yield (
            "parallel.fsdp",
            f"{parallel.fsdp}, but parallel.ep = {parallel.ep} gives those ranks experts of their own; expected "
            "off, or ep = 1",
        )
    if parallel.fsdp == "teacher" and config.teacher is None:
        yield "parallel.fsdp", "teacher, but there is no teacher; expected off or both"
    if parallel.fsdp_by == "megatron" and parallel.fsdp != "both":
        yield (
            "parallel.fsdp_by",
            f"megatron, but parallel.fsdp is {parallel.fsdp}, and a teacher is cut by torch's; expected torch, or "
            "parallel.fsdp = both",
        )
    if parallel.fsdp == "both" and not config.optimizer.distributed:
        yield "optimizer.distributed", "false, but parallel.fsdp = both cuts its state; expected true"


def teacher_problems(config) -> Iterator[tuple[str, str]]:
    """Of a teacher's own layout."""
    own, parallel = config.teacher.parallel, config.parallel
    if config.teacher.cache is not None:
        yield (
            "teacher.parallel",
            f"given with teacher.cache, which is recorded without a student; expected null, and parallel.tp = {own.tp} "
            "to record",
        )
    if own.sp and own.tp == 1:
        yield "teacher.parallel.sp", "true, but teacher.parallel.tp is 1; expected false"
    if own.tp == parallel.tp:
        return
    if own.tp % parallel.tp:
        nearest = -(-own.tp // parallel.tp) * parallel.tp
        yield "teacher.parallel.tp", f"{own.tp} is no multiple of parallel.tp = {parallel.tp}; expected {nearest}"
    for axis in ("cp", "ep"):
        if (size := getattr(parallel, axis)) > 1:
            yield (
                "teacher.parallel.tp",
                f"{own.tp}, but parallel.{axis} = {size} divides the ranks of student replicas in another way; "
                f"expected {parallel.tp}, or {axis} = 1",
            )
    if config.features is not None:
        yield (
            "features",
            f"given with teacher.parallel.tp = {own.tp}, whose hidden states are of other replicas too; expected "
            f"{parallel.tp}",
        )


def sequence_problems(config) -> Iterator[tuple[str, str]]:
    """Of the length of a row, which both models cut."""
    length, parallel, teacher = config.data.sequence_length, config.parallel, config.teacher_parallel
    if parallel.sp and length % parallel.tp:
        yield (
            "data.sequence_length",
            f"{length} is not divisible by parallel.tp = {parallel.tp}, and parallel.sp is true",
        )
    elif length % parallel.sequence_multiple:
        words = f"2 x parallel.cp = {2 * parallel.cp}" + (f" x parallel.tp = {parallel.tp}" if parallel.sp else "")
        nearest = -(-length // parallel.sequence_multiple) * parallel.sequence_multiple
        yield "data.sequence_length", f"{length} is not divisible by {words}; expected {nearest}"
    elif length % config.sequence_multiple:
        nearest = -(-length // config.sequence_multiple) * config.sequence_multiple
        yield (
            "data.sequence_length",
            f"{length} is not divisible by teacher.parallel.tp = {teacher.tp}, whose ranks cut sequences; "
            f"expected {nearest}, or teacher.parallel.sp = false",
        )
    if parallel.cp > 1 and config.data.packing:
        yield (
            "data.packing",
            f"true, but parallel.cp = {parallel.cp} cuts every row as one sequence; expected false",
        )
