"""Pieces of mapping tables: norms, attention, feed-forward blocks, as most families name them."""

from collections.abc import Iterator

from megakd.config import Model
from megakd.converters.rules import Rule, copy, plus_one, qkv, stack

INPUT_NORM = "self_attention.linear_qkv.layer_norm_"
FEED_FORWARD_NORM = "mlp.linear_fc1.layer_norm_"


def norm(model: Model, ours: str, theirs: str, *, stores_gain: bool = False) -> Iterator[Rule]:
    """`ours` ends before "weight", `theirs` before ".weight".

    Args:
        stores_gain: the family stores the gain itself, even if the model stores it minus one.
    """
    rule = plus_one if stores_gain and model.norm_zero_centered else copy
    yield rule(f"{ours}weight", f"{theirs}.weight")
    if model.normalization == "LayerNorm":
        yield copy(f"{ours}bias", f"{theirs}.bias")


def linear(ours: str, theirs: str, *, bias: bool) -> Iterator[Rule]:
    yield copy(f"{ours}.weight", f"{theirs}.weight")
    if bias:
        yield copy(f"{ours}.bias", f"{theirs}.bias")


def attention(model: Model, ours: str, theirs: str, output: str = "o_proj") -> Iterator[Rule]:
    """q_proj, k_proj, v_proj and o_proj, and the norms of queries and keys."""
    heads = model.num_attention_heads
    for kind in ["weight", "bias"] if model.add_bias_linear or model.add_qkv_bias else ["weight"]:
        names = tuple(f"{theirs}{part}_proj.{kind}" for part in "qkv")
        yield qkv(f"{ours}linear_qkv.{kind}", names, heads, model.num_query_groups or heads, model.head_channels)
    yield from linear(f"{ours}linear_proj", f"{theirs}{output}", bias=model.add_bias_linear)
    if model.qk_norm:
        yield from norm(model, f"{ours}q_layernorm.", f"{theirs}q_norm")
        yield from norm(model, f"{ours}k_layernorm.", f"{theirs}k_norm")


def gated_block(
    model: Model, ours: str, theirs: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> Iterator[Rule]:
    gate, up, down = (f"{theirs}{name}" for name in names)
    for kind in ["weight", "bias"] if model.add_bias_linear else ["weight"]:
        yield stack(f"{ours}linear_fc1.{kind}", f"{gate}.{kind}", f"{up}.{kind}")
    yield from linear(f"{ours}linear_fc2", down, bias=model.add_bias_linear)


def plain_block(
    model: Model, ours: str, theirs: str, names: tuple[str, str] = ("up_proj", "down_proj")
) -> Iterator[Rule]:
    yield from linear(f"{ours}linear_fc1", f"{theirs}{names[0]}", bias=model.add_bias_linear)
    yield from linear(f"{ours}linear_fc2", f"{theirs}{names[1]}", bias=model.add_bias_linear)


def ends(
    model: Model,
    embedding: str = "model.embed_tokens",
    final_norm: str = "model.norm",
    head: str = "lm_head",
    *,
    stores_gain: bool = False,
) -> Iterator[Rule]:
    """Embedding, final norm, and the head if it has a weight of its own."""
    yield copy("embedding.word_embeddings.weight", f"{embedding}.weight")
    yield from norm(model, "decoder.final_layernorm.", final_norm, stores_gain=stores_gain)
    if not model.tie_embeddings:
        yield copy("output_layer.weight", f"{head}.weight")


def layers(model: Model, theirs: str = "model.layers.{}.") -> Iterator[tuple[int, str, str]]:
    """(number, our prefix, their prefix) of every layer."""
    for i in range(model.num_layers):
        yield i, f"decoder.layers.{i}.", theirs.format(i)
