"""Arithmetic of a step: what a model's passes need, and how many tokens a second that allows."""

from megakd.config import Config, Model
from megakd.planning.parameters import active_parameters, embedding_parameters


def forward_flops(model: Model, sequence_length: int) -> float:
    """Of one token: multiply-adds of matrix products counted twice; norms and rotations are left out of account.

    Attention counts half of the positions, for it is causal. Source: arXiv:2205.05198, appendix A.
    """
    embeddings = embedding_parameters(model, model.vocab_size)
    products = active_parameters(model) - embeddings + (model.vocab_size * model.hidden_size * model.tie_embeddings)
    of_values = model.head_channels if model.mla is None else model.mla.v_head_dim
    seen = sum(
        min(sequence_length / 2, model.sliding_window if model.has_window(layer) else sequence_length)
        for layer in range(model.num_layers)
    )
    return 2 * (products + seen * model.num_attention_heads * (model.head_channels + of_values))


def step_flops_per_token(config: Config, student: Model, teacher: Model | None) -> tuple[float, float]:
    """(what the models need, what is computed with recomputation) for one token of training."""
    length = config.data.sequence_length
    forward = forward_flops(student, length)
    theirs = forward_flops(teacher, length) if teacher else 0
    again = forward if config.train.recompute == "full" else 0
    return 3 * forward + theirs, 3 * forward + theirs + again


def tokens_per_second(
    config: Config, student: Model, teacher: Model | None, world_size: int, flops: float, mfu: float
) -> float:
    """Of all ranks together, where so much of the hardware's arithmetic is the models'.

    Recomputed passes and the wait at the ends of a pipeline, which the share is not blamed for, come on top.
    """
    parallel, train = config.parallel, config.train
    dp = world_size // (parallel.tp * parallel.pp * parallel.cp)
    number = train.global_batch_size // (train.micro_batch_size * dp)
    waiting = (parallel.pp - 1) / (number * parallel.vpp)
    _, computed = step_flops_per_token(config, student, teacher)
    return world_size * flops * mfu / (computed * (1 + waiting))
