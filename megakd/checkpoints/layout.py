"""Where a tensor of ours lies in a Megatron torch_dist folder, and which shape the model section gives it.

Layers (and experts) of one kind are stacked into one tensor under a name without their number, unless only some
layers have experts: then every layer has its own names. Megatron does the same on its side.

Legend: N query heads, G query groups, D channels of a head, H hidden, F inner width, E experts, V vocabulary.
"""

import dataclasses
import re

from megakd.config import Model

LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
EXPERT = re.compile(r"\.experts\.(\d+)\.")
FUSED_LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")

OPT_UNUSED_POSITIONS = "extra.opt_unused_positions"


@dataclasses.dataclass(frozen=True)
class Place:
    """A tensor's place: it is `key`[index], where key has the leading axes `sizes` before the tensor's own."""

    key: str
    index: tuple[int, ...]
    sizes: tuple[int, ...]


def is_stacked(model: Model) -> bool:
    return model.moe is None or model.moe.layers is None


def place(name: str, model: Model) -> Place:
    """Where the tensor of this name is kept; `extra.` names are kept as they are."""
    index, sizes = [], []
    if (layer := LAYER.match(name)) and is_stacked(model):
        index, sizes = [int(layer[1])], [model.num_layers]
        name = f"decoder.layers.{name[layer.end() :]}"
    if expert := EXPERT.search(name):
        index.append(int(expert[1]))
        sizes.append(model.moe.num_experts)
        name = f"{name[: expert.start()]}.experts.experts.{name[expert.end() :]}"
    return Place(name, tuple(index), tuple(sizes))


def names_in(key: str, model: Model) -> list[str]:
    """The names of the tensors that are kept under a key: `place` backwards."""
    names = [key]
    if key.startswith("decoder.layers.") and is_stacked(model):
        rest = key.removeprefix("decoder.layers.")
        names = [f"decoder.layers.{layer}.{rest}" for layer in range(model.num_layers)]
    if ".experts.experts." in key:
        experts = range(model.moe.num_experts)
        names = [name.replace(".experts.experts.", f".experts.{i}.") for name in names for i in experts]
    return names


def extra_states(model: Model) -> list[Place]:
    """The placeholder objects that Megatron's linear layers want to find beside their weights."""
    names = []
    for i in range(model.num_layers):
        linears = [name for name in FUSED_LINEARS if model.mla is None or "linear_qkv" not in name]
        if model.has_experts(i):
            linears = [name for name in linears if not name.startswith("mlp")]
        names += [f"decoder.layers.{i}.{linear}._extra_state" for linear in linears]
    return [place(name, model) for name in names]


def expected_shape(name: str, model: Model) -> tuple[int, ...] | None:
    """The shape that the model section gives a tensor of ours; None for the `extra.` tensors it knows nothing of."""
    if name == OPT_UNUSED_POSITIONS:
        return 2, model.hidden_size
    if name.startswith("extra."):
        return None
    expert = bool(EXPERT.search(name))
    suffix = EXPERT.sub(".experts.", LAYER.sub("", name))
    shapes = _attention_shapes(model) | _feed_forward_shapes(model, expert=expert, shared="shared_experts" in name)
    hidden = (model.hidden_size,)
    shapes |= {
        "embedding.word_embeddings.weight": (model.vocab_size, *hidden),
        "output_layer.weight": (model.vocab_size, *hidden),
        "embedding.position_embeddings.weight": (model.max_sequence_length, *hidden),
    }
    for known, shape in shapes.items():
        if suffix == known or suffix.endswith("." + known):
            return shape
    assert "norm" in suffix, f"{name} is no tensor of a GPT"
    return hidden


def _attention_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    hidden, heads = model.hidden_size, model.num_attention_heads
    if model.mla is not None:
        mla = model.mla
        queries = heads * (mla.qk_head_dim + mla.qk_rope_head_dim)
        return {
            "linear_q_proj.weight": (queries, hidden),
            "linear_q_down_proj.weight": (mla.q_lora_rank, hidden),
            "linear_q_up_proj.weight": (queries, mla.q_lora_rank),
            "linear_q_up_proj.layer_norm_weight": (mla.q_lora_rank,),
            "linear_kv_down_proj.weight": (mla.kv_lora_rank + mla.qk_rope_head_dim, hidden),
            "linear_kv_up_proj.weight": (heads * (mla.qk_head_dim + mla.v_head_dim), mla.kv_lora_rank),
            "linear_kv_up_proj.layer_norm_weight": (mla.kv_lora_rank,),
            "linear_proj.weight": (hidden, heads * mla.v_head_dim),
        }
    groups, channels = model.num_query_groups or heads, model.head_channels
    together = model.qk_norm_over == "all_heads"
    return {
        "linear_qkv.weight": ((heads + 2 * groups) * channels, hidden),
        "linear_qkv.bias": ((heads + 2 * groups) * channels,),
        "linear_proj.weight": (hidden, heads * channels),
        "linear_proj.bias": (hidden,),
        "q_layernorm.weight": (channels * heads if together else channels,),
        "k_layernorm.weight": (channels * groups if together else channels,),
    }


def _feed_forward_shapes(model: Model, *, expert: bool, shared: bool) -> dict[str, tuple[int, ...]]:
    hidden, inner = model.hidden_size, model.ffn_hidden_size
    shapes = {}
    if model.moe is not None:
        shapes = {
            "router.weight": (model.moe.num_experts, hidden),
            "router.expert_bias": (model.moe.num_experts,),
            "shared_experts.gate_weight": (1, hidden),
        }
        inner = model.moe.ffn_hidden_size if expert else model.moe.shared_ffn_hidden_size if shared else inner
    first = inner * (2 if model.gated else 1) if inner else None
    return shapes | {
        "linear_fc1.weight": (first, hidden),
        "linear_fc1.bias": (first,),
        "linear_fc2.weight": (hidden, inner),
        "linear_fc2.bias": (hidden,),
    }
