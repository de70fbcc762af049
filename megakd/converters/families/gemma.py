"""Gemma 1 to 3: gains stored minus one, scaled embeddings, norms after the blocks, soft caps, a rope of two bases."""

from collections.abc import Iterator

from megakd.config import Model
from megakd.converters.families.family import GATED, Family, activation, cannot_express, plain_fields
from megakd.converters.families.llama import rules, window_fields
from megakd.converters.families.parts import FEED_FORWARD_NORM, INPUT_NORM, attention, ends, gated_block, layers, norm
from megakd.converters.rules import Rule


def gemma_fields(config, rope: dict | None = None) -> dict:
    name = getattr(config, "hidden_activation", None) or config.hidden_act
    if config.attention_bias or getattr(config, "use_bidirectional_attention", None):
        raise cannot_express(config, "attention_bias is true, or attention is not causal")
    return plain_fields(config, rope) | {
        "activation": activation(config, GATED, name),
        "norm_zero_centered": True,
        "embedding_multiplier": float(config.hidden_size) ** 0.5,
    }


def capped_fields(config, rope: dict | None = None) -> dict:
    return (
        gemma_fields(config, rope)
        | {
            "post_norms": True,
            "softmax_scale": float(config.query_pre_attn_scalar) ** -0.5,
            "attention_softcap": config.attn_logit_softcapping,
            "logit_softcap": config.final_logit_softcapping,
        }
        | window_fields(config, True, config.layer_types)
    )


def gemma3_model(config) -> dict:
    rope = config.rope_parameters
    local = rope["sliding_attention"]
    if local.get("rope_type", "default") != "default":
        raise cannot_express(config, f"the sliding layers' rope type {local['rope_type']!r}; expected default")
    fields = capped_fields(config, dict(rope["full_attention"])) | {"qk_norm": True}
    if fields.get("sliding_window"):
        fields["sliding_window_rotary_base"] = float(local["rope_theta"])
    return fields


def post_norm_rules(model: Model) -> Iterator[Rule]:
    yield from ends(model)
    for _, ours, theirs in layers(model):
        yield from norm(model, ours + INPUT_NORM, f"{theirs}input_layernorm")
        yield from attention(model, f"{ours}self_attention.", f"{theirs}self_attn.")
        after = f"{theirs}post_attention_layernorm", f"{theirs}post_feedforward_layernorm"
        yield from norm(model, f"{ours}self_attention.linear_proj.post_layernorm.", after[0])
        yield from norm(model, ours + FEED_FORWARD_NORM, f"{theirs}pre_feedforward_layernorm")
        yield from gated_block(model, f"{ours}mlp.", f"{theirs}mlp.")
        yield from norm(model, f"{ours}mlp.linear_fc2.post_layernorm.", after[1])


FAMILIES = [
    Family("gemma", "GemmaForCausalLM", gemma_fields, rules),
    Family("gemma2", "Gemma2ForCausalLM", capped_fields, post_norm_rules),
    Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        gemma3_model,
        post_norm_rules,
        refused="with images; rope of the sliding layers that is stretched",
    ),
]
