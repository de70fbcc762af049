"""What a family of Hugging Face models is to the converter, and the readings of config.json that families share."""

import dataclasses
import re
from collections.abc import Callable, Iterable

from megakd.config import Model
from megakd.converters.rules import Rule
from megakd.errors import CheckpointError

PLAIN = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "squared_relu",
}
GATED = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu",
    "gelu_new": "geglu_tanh",
    "gelu_pytorch_tanh": "geglu_tanh",
    "relu": "reglu",
}
THEIR_ACTIVATION = {
    "swiglu": "silu",
    "geglu": "gelu",
    "geglu_tanh": "gelu_pytorch_tanh",
    "reglu": "relu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "squared_relu": "relu2",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture of transformers, read and written.

    Attributes:
        model_type, architecture: as in config.json.
        model: fields of the model section from a transformers config; raises CheckpointError for what cannot be
            expressed exactly.
        rules: the mapping of tensors for a model section.
        config: config.json's fields for a model section that did not come from Hugging Face; None: there is no way.
        ignored: patterns of tensors that hold no weights; they are kept beside the model and given back.
        prefix: of all tensors but the head; files written from the bare model lack it.
        adds_gain: a model that stores its gains minus one may be written as this family, with one added.
        refused: which of its models cannot be expressed exactly, for `megakd convert --list`.
    """

    model_type: str
    architecture: str
    model: Callable[[object], dict]
    rules: Callable[[Model], Iterable[Rule]]
    config: Callable[[Model], dict] | None = None
    ignored: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)
    prefix: str = "model."
    refused: str = ""
    adds_gain: bool = False

    def is_ignored(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)


def cannot_express(config, reason: str) -> CheckpointError:
    return CheckpointError(
        f"this {config.model_type} model cannot be expressed exactly: {reason}",
        hint="`megakd convert --list` shows what can; nothing was written",
    )


def plain_fields(config, rope: dict | None = None) -> dict:
    """The fields that nearly every family spells alike; `rope` stands for rope_parameters where those are nested."""
    heads = config.num_attention_heads
    channels = getattr(config, "head_dim", None)
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": getattr(config, "intermediate_size", None),
        "num_attention_heads": heads,
        "num_query_groups": getattr(config, "num_key_value_heads", None) or heads,
        "kv_channels": channels if channels not in (None, config.hidden_size // heads) else None,
        "max_sequence_length": config.max_position_embeddings,
        "norm_epsilon": float(getattr(config, "rms_norm_eps", 1e-5)),
        "tie_embeddings": bool(config.tie_word_embeddings),
        "init_std": float(getattr(config, "initializer_range", 0.02)),
        "vocab_size": config.vocab_size,
        **rope_fields(config, rope_parameters(config) if rope is None else rope),
    }


def rope_parameters(config) -> dict:
    """rope_parameters as transformers 5 has them, also of a config of transformers 4."""
    if getattr(config, "rope_parameters", None) is not None:
        return dict(config.rope_parameters)
    return {**(getattr(config, "rope_scaling", None) or {}), "rope_theta": getattr(config, "rope_theta", 10000.0)}


def rope_fields(config, parameters: dict) -> dict:
    """rotary_base and rope_scaling from one set of rope parameters."""
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    fields = {"rotary_base": float(parameters.get("rope_theta", 10000.0))}
    if kind == "default":
        return fields
    if kind == "linear":
        return fields | {"rope_scaling": {"kind": "linear", "factor": float(parameters["factor"])}}
    if kind == "llama3":
        return fields | {
            "rope_scaling": {
                "kind": "llama3",
                "factor": float(parameters["factor"]),
                "low_freq_factor": float(parameters["low_freq_factor"]),
                "high_freq_factor": float(parameters["high_freq_factor"]),
                "original_length": int(parameters["original_max_position_embeddings"]),
            }
        }
    raise cannot_express(config, f"rope type {kind!r}; expected default, linear or llama3")


def rotary_percent(config) -> float:
    """The share of rotated channels, for the families whose transformers class looks at it; Llama's does not."""
    said = rope_parameters(config).get("partial_rotary_factor")
    return float(said or getattr(config, "partial_rotary_factor", None) or getattr(config, "rotary_pct", None) or 1.0)


def activation(config, table: dict[str, str], name: str) -> str:
    if name not in table:
        raise cannot_express(config, f"activation {name!r}; expected one of {', '.join(table)}")
    return table[name]


def their_plain_fields(model: Model) -> dict:
    """config.json's fields for what `plain_fields` reads."""
    rope = {"rope_type": "default", "rope_theta": model.rotary_base}
    if model.rotary_percent != 1.0:
        rope["partial_rotary_factor"] = model.rotary_percent
    if (scaling := model.rope_scaling) is not None:
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_length,
            }
    return {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
        "head_dim": model.head_channels,
        "max_position_embeddings": model.max_sequence_length,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        "vocab_size": model.vocab_size,
        "hidden_act": THEIR_ACTIVATION[model.activation],
        "rope_parameters": rope,
    }
