"""Llama and its relatives: separate q/k/v, RMSNorm, a gated block, rotary positions."""

from collections.abc import Iterator

from megakd.config import Model
from megakd.converters.families.family import (
    GATED,
    PLAIN,
    Family,
    activation,
    cannot_express,
    plain_fields,
    rotary_percent,
    their_plain_fields,
)
from megakd.converters.families.parts import (
    FEED_FORWARD_NORM,
    INPUT_NORM,
    attention,
    ends,
    gated_block,
    layers,
    norm,
    plain_block,
)
from megakd.converters.rules import Rule, copy, packed_qkv


def rules(model: Model) -> Iterator[Rule]:
    yield from ends(model)
    for _, ours, theirs in layers(model):
        yield from norm(model, ours + INPUT_NORM, f"{theirs}input_layernorm")
        yield from attention(model, f"{ours}self_attention.", f"{theirs}self_attn.")
        yield from norm(model, ours + FEED_FORWARD_NORM, f"{theirs}post_attention_layernorm")
        block = gated_block if model.gated else plain_block
        yield from block(model, f"{ours}mlp.", f"{theirs}mlp.")


def gated_fields(config) -> dict:
    return plain_fields(config) | {"activation": activation(config, GATED, config.hidden_act)}


def window_fields(config, in_use: bool, layer_kinds: list[str] | None) -> dict:
    """sliding_window, and the layers that have it where the config says so layer by layer."""
    if not in_use or not config.sliding_window:
        return {}
    if layer_kinds is None:
        return {"sliding_window": config.sliding_window}
    windowed = [i for i, kind in enumerate(layer_kinds) if kind == "sliding_attention"]
    if not windowed:
        return {}
    everywhere = len(windowed) == len(layer_kinds)
    return {"sliding_window": config.sliding_window, "sliding_window_layers": None if everywhere else windowed}


def llama_model(config) -> dict:
    if bool(config.attention_bias) != bool(config.mlp_bias):
        raise cannot_express(
            config,
            f"attention_bias is {config.attention_bias} and mlp_bias {config.mlp_bias}; Megatron has biases in all "
            "linear layers, in q/k/v alone, or in none",
        )
    return gated_fields(config) | {"add_bias_linear": bool(config.mlp_bias)}


def llama_config(model: Model) -> dict:
    return their_plain_fields(model) | {"attention_bias": model.add_bias_linear, "mlp_bias": model.add_bias_linear}


def mistral_model(config) -> dict:
    return gated_fields(config) | window_fields(config, True, getattr(config, "layer_types", None))


def mistral_config(model: Model) -> dict:
    return their_plain_fields(model) | {"sliding_window": model.sliding_window}


def qwen2_model(config) -> dict:
    windows = window_fields(config, config.use_sliding_window, config.layer_types)
    return gated_fields(config) | {"add_qkv_bias": True} | windows


def qwen_config(model: Model) -> dict:
    windowed = [model.has_window(i) for i in range(model.num_layers)]
    return their_plain_fields(model) | {
        "use_sliding_window": any(windowed),
        "sliding_window": model.sliding_window,
        "layer_types": ["sliding_attention" if w else "full_attention" for w in windowed],
    }


def seed_oss_model(config) -> dict:
    if not config.attention_bias or config.attention_out_bias or config.mlp_bias:
        raise cannot_express(config, "its biases are others than those of queries, keys and values")
    return gated_fields(config) | {"add_qkv_bias": True}


def seed_oss_config(model: Model) -> dict:
    biases = {"attention_bias": True, "attention_out_bias": False, "mlp_bias": False, "residual_dropout": 0.0}
    return their_plain_fields(model) | biases


def qwen3_model(config) -> dict:
    if config.attention_bias:
        raise cannot_express(config, "attention_bias is true, which biases the output projection too")
    return (
        gated_fields(config) | {"qk_norm": True} | window_fields(config, config.use_sliding_window, config.layer_types)
    )


def phi3_model(config) -> dict:
    windows = window_fields(config, True, getattr(config, "layer_types", None))
    return gated_fields(config) | {"rotary_percent": rotary_percent(config)} | windows


def phi3_config(model: Model) -> dict:
    return their_plain_fields(model) | {"sliding_window": model.sliding_window, "pad_token_id": None}


def phi3_rules(model: Model) -> Iterator[Rule]:
    yield from ends(model)
    heads = model.num_attention_heads
    for _, ours, theirs in layers(model):
        yield from norm(model, ours + INPUT_NORM, f"{theirs}input_layernorm")
        names = f"{ours}self_attention.linear_qkv.weight", f"{theirs}self_attn.qkv_proj.weight"
        yield packed_qkv(*names, heads, model.num_query_groups or heads, model.head_channels)
        yield copy(f"{ours}self_attention.linear_proj.weight", f"{theirs}self_attn.o_proj.weight")
        yield from norm(model, ours + FEED_FORWARD_NORM, f"{theirs}post_attention_layernorm")
        yield copy(f"{ours}mlp.linear_fc1.weight", f"{theirs}mlp.gate_up_proj.weight")
        yield copy(f"{ours}mlp.linear_fc2.weight", f"{theirs}mlp.down_proj.weight")


def smollm3_model(config) -> dict:
    if config.attention_bias or config.mlp_bias:
        raise cannot_express(config, "attention_bias or mlp_bias is true")
    unrotated = [i for i, rotates in enumerate(config.no_rope_layers) if not rotates]
    windows = window_fields(config, config.use_sliding_window, config.layer_types)
    return gated_fields(config) | {"no_rope_layers": unrotated} | windows


def arcee_model(config) -> dict:
    if config.attention_bias or config.mlp_bias:
        raise cannot_express(config, "attention_bias or mlp_bias is true")
    return plain_fields(config) | {"activation": activation(config, PLAIN, config.hidden_act)}


def stablelm_model(config) -> dict:
    if config.use_parallel_residual or config.qk_layernorm:
        raise cannot_express(config, "it has a parallel residual on a shared norm, or norms of queries and keys")
    return gated_fields(config) | {
        "normalization": "LayerNorm",
        "norm_epsilon": float(config.layer_norm_eps),
        "rotary_percent": rotary_percent(config),
        "add_qkv_bias": bool(config.use_qkv_bias),
    }


def stablelm_rules(model: Model) -> Iterator[Rule]:
    """NeMo's GPT-2B computes what StableLM does, but stores its gains minus one; it is written with them added."""
    yield from ends(model, stores_gain=True)
    for _, ours, theirs in layers(model):
        yield from norm(model, ours + INPUT_NORM, f"{theirs}input_layernorm", stores_gain=True)
        yield from attention(model, f"{ours}self_attention.", f"{theirs}self_attn.")
        yield from norm(model, ours + FEED_FORWARD_NORM, f"{theirs}post_attention_layernorm", stores_gain=True)
        yield from gated_block(model, f"{ours}mlp.", f"{theirs}mlp.")


def stablelm_config(model: Model) -> dict:
    return their_plain_fields(model) | {
        "layer_norm_eps": model.norm_epsilon,
        "use_qkv_bias": model.add_qkv_bias,
        "use_parallel_residual": False,
        "qk_layernorm": False,
        "partial_rotary_factor": model.rotary_percent,
    }


def starcoder2_model(config) -> dict:
    return (
        plain_fields(config)
        | {
            "normalization": "LayerNorm",
            "norm_epsilon": float(config.norm_epsilon),
            "activation": activation(config, PLAIN, config.hidden_act),
            "add_bias_linear": bool(config.use_bias),
        }
        | window_fields(config, True, getattr(config, "layer_types", None))
    )


def starcoder2_config(model: Model) -> dict:
    return their_plain_fields(model) | {
        "norm_epsilon": model.norm_epsilon,
        "use_bias": model.add_bias_linear,
        "sliding_window": model.sliding_window,
        "hidden_dropout": 0.0,
    }


def starcoder2_rules(model: Model) -> Iterator[Rule]:
    yield from ends(model)
    for _, ours, theirs in layers(model):
        yield from norm(model, ours + INPUT_NORM, f"{theirs}input_layernorm")
        yield from attention(model, f"{ours}self_attention.", f"{theirs}self_attn.")
        yield from norm(model, ours + FEED_FORWARD_NORM, f"{theirs}post_attention_layernorm")
        yield from plain_block(model, f"{ours}mlp.", f"{theirs}mlp.", ("c_fc", "c_proj"))


def nemotron_model(config) -> dict:
    if config.attention_bias or config.mlp_bias:
        raise cannot_express(config, "attention_bias or mlp_bias is true")
    return plain_fields(config) | {
        "normalization": "LayerNorm",
        "norm_zero_centered": True,
        "norm_epsilon": float(config.norm_eps),
        "rotary_percent": rotary_percent(config),
        "activation": activation(config, PLAIN, config.hidden_act),
    }


def nemotron_config(model: Model) -> dict:
    return their_plain_fields(model) | {
        "norm_eps": model.norm_epsilon,
        "partial_rotary_factor": model.rotary_percent,
    }


def granite_model(config) -> dict:
    """Its four factors; the logits' one divides the hidden states here, before the head."""
    return llama_model(config) | {
        "embedding_multiplier": float(config.embedding_multiplier),
        "residual_multiplier": float(config.residual_multiplier),
        "softmax_scale": float(config.attention_multiplier),
        "logit_divisor": float(config.logits_scaling),
    }


def granite_config(model: Model) -> dict:
    return llama_config(model) | {
        "embedding_multiplier": model.embedding_multiplier,
        "residual_multiplier": model.residual_multiplier,
        "attention_multiplier": model.softmax_scale or model.head_channels**-0.5,
        "logits_scaling": model.logit_divisor,
    }


def olmo2_model(config) -> dict:
    if config.attention_bias:
        raise cannot_express(config, "attention_bias is true, without biases in the feed-forward block")
    return gated_fields(config) | {
        "pre_norms": False,
        "post_norms": True,
        "qk_norm": True,
        "qk_norm_over": "all_heads",
    }


def olmo2_config(model: Model) -> dict:
    return their_plain_fields(model) | {"attention_bias": False, "pad_token_id": None}


def olmo2_rules(model: Model) -> Iterator[Rule]:
    yield from ends(model)
    for _, ours, theirs in layers(model):
        yield from attention(model, f"{ours}self_attention.", f"{theirs}self_attn.")
        after = f"{theirs}post_attention_layernorm", f"{theirs}post_feedforward_layernorm"
        yield from norm(model, f"{ours}self_attention.linear_proj.post_layernorm.", after[0])
        yield from gated_block(model, f"{ours}mlp.", f"{theirs}mlp.")
        yield from norm(model, f"{ours}mlp.linear_fc2.post_layernorm.", after[1])


FAMILIES = [
    Family(
        "llama",
        "LlamaForCausalLM",
        llama_model,
        rules,
        llama_config,
        refused="attention_bias without mlp_bias; dynamic, longrope or yarn rope",
    ),
    Family("mistral", "MistralForCausalLM", mistral_model, rules, mistral_config),
    Family("qwen2", "Qwen2ForCausalLM", qwen2_model, rules, qwen_config),
    Family("qwen3", "Qwen3ForCausalLM", qwen3_model, rules, qwen_config, refused="attention_bias"),
    Family("seed_oss", "SeedOssForCausalLM", seed_oss_model, rules, seed_oss_config, refused="other biases"),
    Family("phi3", "Phi3ForCausalLM", phi3_model, phi3_rules, phi3_config, refused="longrope"),
    Family("smollm3", "SmolLM3ForCausalLM", smollm3_model, rules, refused="biases"),
    Family("arcee", "ArceeForCausalLM", arcee_model, rules, their_plain_fields, refused="biases"),
    Family(
        "stablelm",
        "StableLmForCausalLM",
        stablelm_model,
        stablelm_rules,
        stablelm_config,
        adds_gain=True,
        refused="parallel residual, norms of queries and keys",
    ),
    Family("starcoder2", "Starcoder2ForCausalLM", starcoder2_model, starcoder2_rules, starcoder2_config),
    Family(
        "granite",
        "GraniteForCausalLM",
        granite_model,
        rules,
        granite_config,
        refused="attention_bias without mlp_bias; dynamic, longrope or yarn rope",
    ),
    Family("olmo2", "Olmo2ForCausalLM", olmo2_model, olmo2_rules, olmo2_config, refused="attention_bias"),
    Family("nemotron", "NemotronForCausalLM", nemotron_model, rules, nemotron_config, refused="biases"),
]
