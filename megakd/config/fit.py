"""What of an architecture does not fit a layout and a sequence length."""

from collections.abc import Iterator

from megakd.config.model import Model
from megakd.config.sections import Parallel


def model_problems(
    model: Model, parallel: Parallel, sequence_length: int, *, trained: bool
) -> Iterator[tuple[str, str]]:
    """Yields (key, what is wrong): keys of the model are bare, keys of the run are dotted."""
    tp, pp, ep = parallel.tp, parallel.pp, parallel.ep
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
        if model.moe.num_experts % ep:
            fitting = " or ".join(str(n) for n in nearest_divisors(model.moe.num_experts, ep))
            yield (
                "moe.num_experts",
                f"{model.moe.num_experts} is not divisible by parallel.ep = {ep}; expected {fitting}",
            )
        for key in ("ffn_hidden_size", "shared_ffn_hidden_size") if ep == 1 else ("shared_ffn_hidden_size",):
            if (getattr(model.moe, key) or 0) % tp:
                yield f"moe.{key}", f"{getattr(model.moe, key)} is not divisible by parallel.tp = {tp}"
    if model.num_layers % pp:
        yield "num_layers", f"{model.num_layers} is not divisible by parallel.pp = {pp}"
    if sequence_length > model.max_sequence_length:
        yield (
            "data.sequence_length",
            f"{sequence_length} tokens exceed the model's max_sequence_length = {model.max_sequence_length}",
        )


def nearest_divisors(number: int, wanted: int) -> list[int]:
    """What divides `number` and is next to `wanted`, below and above."""
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    below, above = [n for n in divisors if n <= wanted], [n for n in divisors if n > wanted]
    return below[-1:] + above[:1]
