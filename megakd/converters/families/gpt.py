"""GPT-2, OPT, GPT-NeoX and Falcon: LayerNorm and a plain feed-forward block."""

from collections.abc import Iterator

from megakd.checkpoints.layout import OPT_UNUSED_POSITIONS
from megakd.config import Model
from megakd.converters.families.family import (
    PLAIN,
    THEIR_ACTIVATION,
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
    layers,
    linear,
    norm,
    plain_block,
)
from megakd.converters.rules import Rule, copy, packed_qkv, split_rows, transposed

ALL_BIASES = {"normalization": "LayerNorm", "add_bias_linear": True}


def gpt2_model(config) -> dict:
    if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights or config.add_cross_attention:
        raise cannot_express(config, "attention is scaled by the layer's number, not at all, or crosses")
    return ALL_BIASES | {
        "num_layers": config.n_layer,
        "hidden_size": config.n_embd,
        "ffn_hidden_size": config.n_inner or 4 * config.n_embd,
        "num_attention_heads": config.n_head,
        "num_query_groups": config.n_head,
        "max_sequence_length": config.n_positions,
        "norm_epsilon": float(config.layer_norm_epsilon),
        "activation": activation(config, PLAIN, config.activation_function),
        "position_embedding": "learned_absolute",
        "tie_embeddings": bool(config.tie_word_embeddings),
        "init_std": float(config.initializer_range),
        "vocab_size": config.vocab_size,
    }


def gpt2_config(model: Model) -> dict:
    return {
        "n_layer": model.num_layers,
        "n_embd": model.hidden_size,
        "n_inner": model.ffn_hidden_size,
        "n_head": model.num_attention_heads,
        "n_positions": model.max_sequence_length,
        "layer_norm_epsilon": model.norm_epsilon,
        "activation_function": "gelu_new" if model.activation == "gelu_tanh" else THEIR_ACTIVATION[model.activation],
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        "vocab_size": model.vocab_size,
    }


def gpt2_rules(model: Model) -> Iterator[Rule]:
    yield from ends(model, "transformer.wte", "transformer.ln_f")
    yield copy("embedding.position_embeddings.weight", "transformer.wpe.weight")
    heads, channels = model.num_attention_heads, model.head_channels
    for _, ours, theirs in layers(model, "transformer.h.{}."):
        yield from norm(model, ours + INPUT_NORM, f"{theirs}ln_1")
        for kind in ("weight", "bias"):
            names = f"{ours}self_attention.linear_qkv.{kind}", f"{theirs}attn.c_attn.{kind}"
            yield transposed(packed_qkv(*names, heads, heads, channels))
        yield from map(transposed, linear(f"{ours}self_attention.linear_proj", f"{theirs}attn.c_proj", bias=True))
        yield from map(transposed, plain_block(model, f"{ours}mlp.", f"{theirs}mlp.", ("c_fc", "c_proj")))
        yield from norm(model, ours + FEED_FORWARD_NORM, f"{theirs}ln_2")


def opt_model(config) -> dict:
    if not config.do_layer_norm_before or config.word_embed_proj_dim != config.hidden_size or not config.enable_bias:
        raise cannot_express(config, "norms come after the blocks, embeddings are projected, or biases are missing")
    if not config.layer_norm_elementwise_affine or config._remove_final_layer_norm:
        raise cannot_express(config, "norms have no weights, or the final one is missing")
    return ALL_BIASES | {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_dim,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_attention_heads,
        "max_sequence_length": config.max_position_embeddings,
        "activation": activation(config, PLAIN, config.activation_function),
        "position_embedding": "learned_absolute",
        "tie_embeddings": bool(config.tie_word_embeddings),
        "init_std": float(config.init_std),
        "vocab_size": config.vocab_size,
    }


def opt_rules(model: Model) -> Iterator[Rule]:
    yield from ends(model, "model.decoder.embed_tokens", "model.decoder.final_layer_norm")
    table = "embedding.position_embeddings.weight", OPT_UNUSED_POSITIONS, "model.decoder.embed_positions.weight"
    yield split_rows(*table, rows=2)  # positions count from 2; rows 0 and 1 are for padding
    for _, ours, theirs in layers(model, "model.decoder.layers.{}."):
        yield from norm(model, ours + INPUT_NORM, f"{theirs}self_attn_layer_norm")
        yield from attention(model, f"{ours}self_attention.", f"{theirs}self_attn.", output="out_proj")
        yield from norm(model, ours + FEED_FORWARD_NORM, f"{theirs}final_layer_norm")
        yield from plain_block(model, f"{ours}mlp.", theirs, ("fc1", "fc2"))


def neox_model(config) -> dict:
    if not config.attention_bias:
        raise cannot_express(config, "attention_bias is false, but the feed-forward block has biases")
    return (
        plain_fields(config)
        | ALL_BIASES
        | {
            "num_query_groups": config.num_attention_heads,
            "norm_epsilon": float(config.layer_norm_eps),
            "activation": activation(config, PLAIN, config.hidden_act),
            "rotary_percent": rotary_percent(config),
            "parallel_residual": bool(config.use_parallel_residual),
        }
    )


def neox_config(model: Model) -> dict:
    return their_plain_fields(model) | {
        "layer_norm_eps": model.norm_epsilon,
        "use_parallel_residual": model.parallel_residual,
        "rotary_pct": model.rotary_percent,
        "attention_bias": True,
    }


def neox_rules(model: Model) -> Iterator[Rule]:
    yield from ends(model, "gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out")
    for _, ours, theirs in layers(model, "gpt_neox.layers.{}."):
        yield from norm(model, ours + INPUT_NORM, f"{theirs}input_layernorm")
        yield from linear(f"{ours}self_attention.linear_qkv", f"{theirs}attention.query_key_value", bias=True)
        yield from linear(f"{ours}self_attention.linear_proj", f"{theirs}attention.dense", bias=True)
        yield from norm(model, ours + FEED_FORWARD_NORM, f"{theirs}post_attention_layernorm")
        yield from plain_block(model, f"{ours}mlp.", f"{theirs}mlp.", ("dense_h_to_4h", "dense_4h_to_h"))


def falcon_model(config) -> dict:
    if config.alibi:
        raise cannot_express(config, "its positions are ALiBi's")
    parallel = bool(config.new_decoder_architecture or config.parallel_attn)
    norms = config.num_ln_in_parallel_attn or (2 if config.new_decoder_architecture else 1)
    if config.new_decoder_architecture and not (config.parallel_attn and norms in (1, 2)):
        raise cannot_express(config, f"its new decoder architecture has {norms} norms, and parallel_attn is false")
    if not config.new_decoder_architecture and norms != 1:
        raise cannot_express(config, f"num_ln_in_parallel_attn is {norms} without new_decoder_architecture")
    heads = config.num_attention_heads
    groups = config.num_kv_heads if config.new_decoder_architecture else 1 if config.multi_query else heads
    return plain_fields(config) | {
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_query_groups": groups,
        "normalization": "LayerNorm",
        "norm_epsilon": float(config.layer_norm_epsilon),
        "activation": activation(config, PLAIN, config.activation),
        "parallel_residual": parallel,
        "shared_norm": parallel and norms == 1,
        "add_bias_linear": bool(config.bias),
    }


def falcon_config(model: Model) -> dict:
    two_norms = model.parallel_residual and not model.shared_norm
    new = two_norms or (model.shared_norm and model.num_query_groups not in (1, model.num_attention_heads))
    unknown = ("head_dim", "num_key_value_heads", "intermediate_size", "hidden_act", "rms_norm_eps")
    return {key: value for key, value in their_plain_fields(model).items() if key not in unknown} | {
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_kv_heads": model.num_query_groups or model.num_attention_heads,
        "layer_norm_epsilon": model.norm_epsilon,
        "activation": THEIR_ACTIVATION[model.activation],
        "alibi": False,
        "new_decoder_architecture": new,
        "num_ln_in_parallel_attn": (2 if two_norms else 1) if new else None,
        "multi_query": not new and model.num_query_groups == 1,
        "parallel_attn": model.parallel_residual,
        "bias": model.add_bias_linear,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def falcon_rules(model: Model) -> Iterator[Rule]:
    """Queries, keys and values lie by group, as Megatron has them, in every generation of the model."""
    yield from ends(model, "transformer.word_embeddings", "transformer.ln_f")
    biased = model.add_bias_linear
    for _, ours, theirs in layers(model, "transformer.h.{}."):
        two_norms = model.parallel_residual and not model.shared_norm
        yield from norm(model, ours + INPUT_NORM, f"{theirs}ln_attn" if two_norms else f"{theirs}input_layernorm")
        yield from linear(f"{ours}self_attention.linear_qkv", f"{theirs}self_attention.query_key_value", bias=biased)
        yield from linear(f"{ours}self_attention.linear_proj", f"{theirs}self_attention.dense", bias=biased)
        if not model.shared_norm:
            after = f"{theirs}ln_mlp" if two_norms else f"{theirs}post_attention_layernorm"
            yield from norm(model, ours + FEED_FORWARD_NORM, after)
        yield from plain_block(model, f"{ours}mlp.", f"{theirs}mlp.", ("dense_h_to_4h", "dense_4h_to_h"))


MASKS = (r".*\.attn\.bias", r".*\.attn\.masked_bias")
NEOX_MASKS = (r".*\.attention\.bias", r".*\.attention\.masked_bias", r".*\.rotary_emb\.inv_freq")

FAMILIES = [
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        gpt2_model,
        gpt2_rules,
        gpt2_config,
        MASKS,
        "transformer.",
        refused="attention scaled by the layer's number",
    ),
    Family(
        "opt",
        "OPTForCausalLM",
        opt_model,
        opt_rules,
        refused="norms after the blocks or projected embeddings (OPT-350m)",
    ),
    Family(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        neox_model,
        neox_rules,
        neox_config,
        NEOX_MASKS,
        "gpt_neox.",
        refused="attention_bias false",
    ),
    Family(
        "falcon",
        "FalconForCausalLM",
        falcon_model,
        falcon_rules,
        falcon_config,
        prefix="transformer.",
        refused="ALiBi positions (Falcon-RW)",
    ),
]
