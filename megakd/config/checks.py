"""Checks of a configuration against what only the launch or a checkpoint knows: ranks, vocabulary, architecture."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megakd.config.problems import problems_error
from megakd.config.sections import Model, Parallel
from megakd.errors import ConfigError

if TYPE_CHECKING:
    from megakd.config.config import Config


def check_ranks(config: "Config", world_size: int) -> int:
    """Checks that the ranks carry the layout and that the batch divides over them.

    Args:
        config: of the run.
        world_size: number of ranks of the launch.

    Returns:
        dp, the number of data parallel copies.

    Raises:
        ConfigError: world_size is not divisible by tp * pp, or global_batch_size not by micro_batch_size * dp.
    """
    tp, pp = config.parallel.tp, config.parallel.pp
    dp = check_layout(config, world_size)
    micro, batch = config.train.micro_batch_size, config.train.global_batch_size
    if batch % (micro * dp):
        raise ConfigError(
            f"train.global_batch_size {batch} is not divisible by train.micro_batch_size {micro} x dp {dp} "
            f"= {micro * dp} ({world_size} ranks / tp {tp} / pp {pp} = dp {dp})",
            hint=f"make train.global_batch_size a multiple of {micro * dp}, or start another number of ranks",
        )
    return dp


def check_layout(config: "Config", world_size: int) -> int:
    """Checks that the ranks carry the layout, whatever the batch; returns dp, or raises ConfigError."""
    tp, pp = config.parallel.tp, config.parallel.pp
    if world_size % (tp * pp):
        raise ConfigError(
            f"{world_size} ranks do not make whole models: parallel.tp {tp} x parallel.pp {pp} = {tp * pp} ranks each",
            hint=f"start a multiple of {tp * pp} ranks (`torchrun --nproc-per-node {tp * pp} -m megakd ...`), "
            "or change parallel.tp and parallel.pp",
        )
    return world_size // (tp * pp)


def check_vocab(config: "Config", vocab_size: int) -> None:
    """Checks that the teacher has `loss.top_k` entries to keep.

    Args:
        config: of the run; without a teacher nothing is checked.
        vocab_size: real vocabulary of the tokenizer, in ids.

    Raises:
        ConfigError: loss.top_k exceeds the vocabulary.
    """
    if config.teacher is not None and config.loss.top_k > vocab_size:
        raise ConfigError(
            f"loss.top_k {config.loss.top_k} exceeds the vocabulary of {vocab_size} ids",
            hint=f"lower loss.top_k to at most {vocab_size}",
        )


def check_model(config: "Config", model: Model, whose: str, *, trained: bool = False) -> None:
    """Checks that an architecture read from a checkpoint fits the run's layout and sequence length.

    Args:
        config: of the run.
        model: architecture of the checkpoint.
        whose: what the error calls it, such as `teacher.checkpoint runs/teacher`.
        trained: it is the student.

    Raises:
        ConfigError: lists all that does not fit.
    """
    problems = list(model_problems(model, config.parallel, config.data.sequence_length, trained=trained))
    if problems:
        raise problems_error(
            whose,
            [f"{key}: {text}" for key, text in problems],
            hint="change the parallel section, or data.sequence_length, to what this model allows",
        )


def check_features(config: "Config", student: Model, teacher: Model) -> None:
    """Checks that the layers of the features section exist and that pairs share a pipeline stage.

    Raises:
        ConfigError: lists all that does not fit.
    """
    if config.features is None:
        return
    problems = config.features.layer_problems(student.num_layers, teacher.num_layers, config.parallel.pp)
    lines = [f"{key}: {text}" for key, text in problems]
    if lines:
        raise problems_error("features", lines, hint="choose layers that both models have, on one stage each pair")


def model_problems(
    model: Model, parallel: Parallel, sequence_length: int, *, trained: bool
) -> Iterator[tuple[str, str]]:
    """Yields (key, what is wrong): keys of the model are bare, keys of the run are dotted."""
    tp, pp = parallel.tp, parallel.pp
    if trained and tp > 1 and model.moe is not None and not parallel.sp:
        yield "parallel.sp", f"false, but Megatron trains experts with parallel.tp = {tp} only with it"
    if model.mla is not None:
        shared = model.mla.kv_lora_rank + model.mla.qk_rope_head_dim
        if shared % tp:
            yield "mla.kv_lora_rank", f"{shared} with qk_rope_head_dim; not divisible by parallel.tp = {tp}"
        if (model.mla.q_lora_rank or 0) % tp:
            yield "mla.q_lora_rank", f"{model.mla.q_lora_rank} is not divisible by parallel.tp = {tp}"
    for key in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        value = getattr(model, key)
        if value is not None and value % tp:
            yield key, f"{value} is not divisible by parallel.tp = {tp}"
    if model.moe is not None:
        for key in ("ffn_hidden_size", "shared_ffn_hidden_size"):
            if (getattr(model.moe, key) or 0) % tp:
                yield f"moe.{key}", f"{getattr(model.moe, key)} is not divisible by parallel.tp = {tp}"
    if model.num_layers % pp:
        yield "num_layers", f"{model.num_layers} is not divisible by parallel.pp = {pp}"
    if sequence_length > model.max_sequence_length:
        yield (
            "data.sequence_length",
            f"{sequence_length} tokens exceed the model's max_sequence_length = {model.max_sequence_length}",
        )
