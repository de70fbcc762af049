"""NeMo's model_config.yaml <-> the model section."""

from megakd.config import Model
from megakd.errors import CheckpointError

GATED = {"swiglu": "swiglu", "reglu": "reglu"}
NORMS = {"layernorm": ("LayerNorm", False), "layernorm1p": ("LayerNorm", True), "rmsnorm": ("RMSNorm", False)}
POSITIONS = {"rope": "rope", "learned_absolute": "learned_absolute"}
PLAIN_NAMES = ("megatron_gpt", "te_gpt", "megatron_gpt_full_te_layer_autocast", "", None)


def cannot_express(reason: str) -> CheckpointError:
    return CheckpointError(f"this .nemo model cannot be expressed exactly: {reason}", hint="nothing was written")


def model_of(config: dict, vocab_size: int) -> Model:
    """The model section.

    Args:
        config: model_config.yaml.
        vocab_size: real vocabulary, in ids.
    Raises:
        CheckpointError: the config uses what cannot be expressed exactly, or does not describe a GPT.
    """
    refuse(config)
    normalization, zero_centered = choose(config, "normalization", NORMS, "layernorm1p")
    try:
        heads = config["num_attention_heads"]
        return Model(
            num_layers=config["num_layers"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config.get("ffn_hidden_size") or 4 * config["hidden_size"],
            num_attention_heads=heads,
            num_query_groups=config.get("num_query_groups") or heads,
            kv_channels=config.get("kv_channels"),
            max_sequence_length=config.get("max_position_embeddings") or config["encoder_seq_length"],
            normalization=normalization,
            norm_zero_centered=zero_centered,
            norm_epsilon=float(config.get("layernorm_epsilon", 1e-5)),
            qk_norm=bool(config.get("qk_layernorm", False)),
            activation=activation(config),
            position_embedding=choose(config, "position_embedding_type", POSITIONS, "learned_absolute"),
            rotary_base=float(config.get("rotary_base", 10000)),
            rotary_percent=float(config.get("rotary_percentage", 1.0)),
            rope_scaling=rope_scaling(config),
            sliding_window=window(config),
            add_bias_linear=bool(config.get("bias", True)),
            add_qkv_bias=bool(config.get("qkv_bias", False)),
            tie_embeddings=bool(config.get("share_embeddings_and_output_weights", True)),
            init_std=float(config.get("init_method_std", 0.02)),
            vocab_size=vocab_size,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"model_config.yaml does not describe a GPT: {type(error).__name__}: {error}",
            hint="is it the config of a megatron_gpt model?",
        ) from error


def refuse(config: dict) -> None:
    if config.get("name") not in PLAIN_NAMES:
        raise cannot_express(f"its model is {config['name']!r}")
    if config.get("transformer_block_type", "pre_ln") != "pre_ln":
        raise cannot_express(f"transformer_block_type {config['transformer_block_type']!r}; expected pre_ln")
    for key, harmless in (("headscale", False), ("normalize_attention_scores", True), ("num_moe_experts", None)):
        if config.get(key, harmless) not in (harmless, 1):
            raise cannot_express(f"{key} is {config[key]!r}")
    if (config.get("num_moe_experts") or 1) > 1:
        raise cannot_express("it has experts")
    if config.get("virtual_pipeline_model_parallel_size"):
        raise cannot_express("its weights are cut for an interleaved pipeline")


def choose(config: dict, key: str, table: dict, default: str):
    value = config.get(key, default)
    if value not in table:
        raise cannot_express(f"{key} {value!r}; expected one of {', '.join(table)}")
    return table[value]


def activation(config: dict) -> str:
    """NeMo fuses a bias with GELU by default, and the fused one is the approximation by tanh."""
    name = config.get("activation", "gelu").removeprefix("fast-")
    fused = config.get("bias_activation_fusion", config.get("bias_gelu_fusion", True))
    tanh = "_tanh" if fused or config.get("openai_gelu", False) else ""
    known = {"gelu": f"gelu{tanh}", "geglu": f"geglu{tanh}", "approx-gelu": "gelu_tanh", "squared-relu": "squared_relu"}
    known |= GATED
    if name not in known:
        raise cannot_express(f"activation {config['activation']!r}; expected one of {', '.join(known)}, or fast-*glu")
    return known[name]


def rope_scaling(config: dict) -> dict | None:
    if config.get("scale_positional_embedding"):
        return {
            "kind": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_length": 8192
        }  # fmt: skip
    if config.get("seq_len_interpolation_factor"):
        return {"kind": "linear", "factor": float(config["seq_len_interpolation_factor"])}
    return None


def window(config: dict) -> int | None:
    size = config.get("window_size")
    return None if not size else int(size[0]) + 1


def config_of(model: Model, tokenizer: str | None) -> dict:
    """A model_config.yaml for an mcore GPT that computes exactly this model.

    Args:
        tokenizer: the artifact's name of a SentencePiece model, or None.
    Raises:
        CheckpointError: NeMo's GPT cannot express it.
    """
    norms = {pair: name for name, pair in NORMS.items()}
    activations = {"gelu": "gelu", "gelu_tanh": "gelu", "squared_relu": "squared-relu", "swiglu": "fast-swiglu"}
    activations |= {"reglu": "fast-reglu", "geglu": "fast-geglu", "geglu_tanh": "fast-geglu"}
    config = {
        "name": "megatron_gpt",
        "mcore_gpt": True,
        "transformer_engine": True,
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups or model.num_attention_heads,
        "kv_channels": model.kv_channels,
        "encoder_seq_length": model.max_sequence_length,
        "max_position_embeddings": model.max_sequence_length,
        "normalization": norms.get((model.normalization, model.norm_zero_centered)),
        "layernorm_epsilon": model.norm_epsilon,
        "qk_layernorm": model.qk_norm,
        "activation": activations.get(model.activation),
        "bias_activation_fusion": model.activation.endswith("tanh"),
        "position_embedding_type": model.position_embedding,
        "rotary_base": model.rotary_base,
        "rotary_percentage": model.rotary_percent,
        "window_size": None if model.sliding_window is None else [model.sliding_window - 1, 0],
        "bias": model.add_bias_linear,
        "qkv_bias": model.add_qkv_bias,
        "share_embeddings_and_output_weights": model.tie_embeddings,
        "init_method_std": model.init_std,
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        "make_vocab_size_divisible_by": 1,
        "override_vocab_size": model.vocab_size,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "megatron_amp_O2": False,
        "tokenizer": {"library": "sentencepiece", "model": f"nemo:{tokenizer}" if tokenizer else None},
    }
    if model.rope_scaling is not None and model.rope_scaling.kind == "linear":
        config["seq_len_interpolation_factor"] = model.rope_scaling.factor
    config["scale_positional_embedding"] = model.rope_scaling is not None and model.rope_scaling.kind == "llama3"
    plain = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "num_query_groups": config["num_query_groups"]}
    if config["activation"] is None or config["normalization"] is None:
        raise cannot_express(f"activation {model.activation}, normalization {model.normalization} of a NeMo GPT")
    again = model_of(config, model.vocab_size)
    wanted = model.model_copy(update=plain)
    if again != wanted:
        wrong = [key for key in type(model).model_fields if getattr(again, key) != getattr(wanted, key)]
        raise cannot_express(f"NeMo's GPT config has no way to say {', '.join(wrong)}")
    return config
