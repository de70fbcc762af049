"""The layout of a run, and what each pipeline stage's ranks hold of both models, as a table for the log."""

import torch.distributed as dist

from megakd.config import Parallel
from megakd.models.gpt import GPT

WIDTHS = (7, 13)


def describe_layout(parallel: Parallel, groups, models: dict[str, GPT]) -> str:
    """The table; a line for each stage.

    Args:
        models: this rank's parts by name.
    Collectives: one all-gather of a short text over pp.
    """
    kinds = {name: "student" if name == "student" else "teacher" for name in models}
    ways = {name: gpt.pg_collection.dp_cp.size() if parallel.shards(kinds[name]) else 1 for name, gpt in models.items()}
    mine = {name: describe_part(gpt, ways[name]) for name, gpt in models.items()}
    stages = [None] * groups.pp.size()
    dist.all_gather_object(stages, mine, group=groups.pp)
    ranks_of_stage = dist.get_world_size() // len(stages)
    columns = [max(len(stage[name]) for stage in [{name: name for name in mine}, *stages]) + 2 for name in mine]
    widths = (*WIDTHS, *columns)

    def line(*cells) -> str:
        return "  " + "".join(str(cell).ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()

    own = next((own_tp(parallel, gpt) for name, gpt in models.items() if kinds[name] == "teacher"), "")
    lines = [f"{dist.get_world_size()} ranks: {axes(parallel, groups)}{own}", line("stage", "ranks", *mine)]
    for number, stage in enumerate(stages):
        first = number * ranks_of_stage
        ranks = str(first) if ranks_of_stage == 1 else f"{first} to {first + ranks_of_stage - 1}"
        lines.append(line(number, ranks, *(stage[name] for name in mine)))
    return "\n".join(lines)


def axes(parallel: Parallel, groups) -> str:
    """Sizes of the axes that are used, and of data parallelism."""
    words = [f"tp {parallel.tp}" + (" with sequence parallel" if parallel.sp else "")] if parallel.tp > 1 else []
    if parallel.cp > 1:
        words.append(f"cp {parallel.cp}")
    if parallel.pp > 1:
        words.append(f"pp {parallel.pp}" + (f" (student: {parallel.vpp} virtual stages)" if parallel.vpp > 1 else ""))
    words.append(f"dp {groups.dp.size()}")
    if parallel.ep > 1:
        words.append(f"experts over ep {parallel.ep}")
    if parallel.fsdp != "off":
        cut = "both models" if parallel.fsdp == "both" else "the teacher"
        whose = ", the student's by Megatron" if parallel.fsdp_by == "megatron" else ""
        words.append(f"FSDP of {cut} over {groups.dp_cp.size()}{whose}")
    return ", ".join(words)


def own_tp(parallel: Parallel, teacher: GPT) -> str:
    """What a teacher over more ranks than the student's adds."""
    tp, fsdp = teacher.config.tensor_model_parallel_size, ""
    if tp == parallel.tp:
        return ""
    if parallel.shards("teacher"):
        fsdp = f", FSDP over {teacher.pg_collection.dp_cp.size()}"
    cut = " with sequence parallel" if teacher.config.sequence_parallel else ""
    return f"; teacher: tp {tp}{cut}, the ranks of {tp // parallel.tp} student replicas{fsdp}"


def describe_part(gpt: GPT, ways: int) -> str:
    """What one rank has of a model: layers, ends, and how many parameters that is.

    Args:
        ways: ranks that FSDP cuts their rows over, or will.
    """
    runs = []
    for chunk in gpt.chunks:
        numbers = [layer.layer_number for layer in chunk.decoder.layers]
        runs.append(str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}")
    parts = [f"layers {' and '.join(runs)}"]
    if gpt.chunks[0].pre_process:
        parts.insert(0, "embedding")
    if gpt.post_process:
        parts.append("head")
    shapes = [parameter.shape for chunk in gpt.chunks for parameter in chunk.parameters()]
    count = sum(-(-shape[0] // ways) * shape[1:].numel() for shape in shapes)
    return f"{', '.join(parts)}: {count / 1e6:,.3f} M a rank"
