"""What of an architecture does not fit a layout and a sequence length."""

from collections.abc import Iterator

from megakd.config.model import Model
from megakd.config.parallel import Parallel, Pipeline

EVEN = Pipeline()


def model_problems(
    model: Model,
    parallel: Parallel,
    sequence_length: int,
    pipeline: Pipeline = EVEN,
    *,
    trained: bool,
    tp_key: str = "parallel.tp",
) -> Iterator[tuple[str, str]]:
    """Yields (key, what is wrong): keys of the model are bare, keys of the run are dotted.

    Args:
        tp_key: what gives the layout's tp.
    """
    tp, ep = parallel.tp, parallel.ep
    if trained and tp > 1 and model.moe is not None and not parallel.sp:
        yield "parallel.sp", f"false, but Megatron trains experts with {tp_key} = {tp} only with it"
    if model.mla is not None:
        shared = model.mla.kv_lora_rank + model.mla.qk_rope_head_dim
        if shared % tp:
            yield "mla.kv_lora_rank", f"{shared} with qk_rope_head_dim; not divisible by {tp_key} = {tp}"
        if (model.mla.q_lora_rank or 0) % tp:
            yield "mla.q_lora_rank", f"{model.mla.q_lora_rank} is not divisible by {tp_key} = {tp}"
    for key in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        value = getattr(model, key)
        if value is not None and value % tp:
            yield key, f"{value} is not divisible by {tp_key} = {tp}"
    if model.moe is not None:
        if model.moe.num_experts % ep:
            fitting = " or ".join(str(n) for n in nearest_divisors(model.moe.num_experts, ep))
            yield (
                "moe.num_experts",
                f"{model.moe.num_experts} is not divisible by parallel.ep = {ep}; expected {fitting}",
            )
        for key in ("ffn_hidden_size", "shared_ffn_hidden_size") if ep == 1 else ("shared_ffn_hidden_size",):
            if (getattr(model.moe, key) or 0) % tp:
                yield f"moe.{key}", f"{getattr(model.moe, key)} is not divisible by {tp_key} = {tp}"
    yield from stage_problems(model.num_layers, parallel, pipeline, "student" if trained else "teacher")
    if sequence_length > model.max_sequence_length:
        yield (
            "data.sequence_length",
            f"{sequence_length} tokens exceed the model's max_sequence_length = {model.max_sequence_length}",
        )


def stage_problems(num_layers: int, parallel: Parallel, pipeline: Pipeline, whose: str) -> Iterator[tuple[str, str]]:
    """Yields (key, what is wrong) with how a model's layers are split over pipeline stages."""
    pp, vpp = parallel.pp, parallel.vpp if whose == "student" else 1
    given = {
        f"{whose}.pipeline.{name}": size
        for name in ("first_stage_layers", "last_stage_layers")
        if (size := getattr(pipeline, name)) is not None
    }
    words = " and ".join(f"{key} = {size}" for key, size in given.items())
    if not given:
        if num_layers % (pp * vpp):
            stages = f"parallel.pp = {pp}" + (f" x parallel.vpp = {vpp}" if vpp > 1 else "")
            nearest = " or ".join(str(n) for n in nearest_divisors(num_layers, pp * vpp))
            yield "num_layers", f"{num_layers} is not divisible by {stages}; {nearest} stages would do"
        return
    left, stages = num_layers - sum(given.values()), pp - len(given)
    key = next(iter(given))
    if pp == 1:
        yield key, f"{given[key]}, but parallel.pp is 1"
    elif vpp > 1:
        yield key, f"{given[key]} with parallel.vpp = {vpp}; expected null, interleaved stages are even"
    elif stages == 0 and left:
        yield key, f"{words} are not the model's {num_layers} layers"
    elif stages and (left < stages or left % stages):
        between = f"{left} of {num_layers} layers for the other {stages} stages"
        yield key, f"{words} leave {between}; expected a multiple of {stages}"


def stages_of(num_layers: int, pp: int, pipeline: Pipeline) -> list[int]:
    """The stage of every layer, for a split that has no problems and is not interleaved."""
    first, last = pipeline.first_stage_layers, pipeline.last_stage_layers
    others = pp - (first is not None) - (last is not None)
    even = (num_layers - (first or 0) - (last or 0)) // others if others else 0
    sizes = [even] * pp
    if first is not None:
        sizes[0] = first
    if last is not None:
        sizes[-1] = last
    return [stage for stage, size in enumerate(sizes) for _ in range(size)]


def nearest_divisors(number: int, wanted: int) -> list[int]:
    """What divides `number` and is next to `wanted`, below and above."""
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    below, above = [n for n in divisors if n <= wanted], [n for n in divisors if n > wanted]
    return below[-1:] + above[:1]
