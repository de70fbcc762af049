"""One table per family of Hugging Face models: config.json and tensors, read in both directions."""

from megakd.config import Model
from megakd.converters.families import gemma, gpt, llama, mixture
from megakd.converters.families.family import Family
from megakd.errors import CheckpointError
from megakd.limits import check_limit

FAMILIES: dict[str, Family] = {
    family.model_type: family for module in (llama, gpt, gemma, mixture) for family in module.FAMILIES
}


REFUSED = {  # model_type -> (architecture, what Megatron-Core 0.16.1 cannot compute)
    "phi": ("PhiForCausalLM", "its head has a bias; a Megatron GPT's head, and the losses fused with it, have none"),
    "gpt_oss": (
        "GptOssForCausalLM",
        "its router and experts have biases, its gated activation is clamped, and a learnt sink takes part in every "
        "softmax; on local layers Megatron has none of these",
    ),
}
LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers")
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")


def family_of(config: dict, where) -> Family:
    """The family that a config.json names.

    Raises:
        CheckpointError: it is none of ours, another head than the language model's, or quantised.
    """
    model_type, architectures = config.get("model_type"), config.get("architectures") or []
    if model_type in REFUSED:
        raise CheckpointError(
            f"{where}: a {REFUSED[model_type][0]} cannot be expressed exactly: {REFUSED[model_type][1]}",
            hint="`megakd convert --list` shows what can; nothing was written",
        )
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None or (architectures and family.architecture not in architectures):
        raise CheckpointError(
            f"{where}: unknown architecture: model_type {model_type!r}, architectures {architectures}",
            hint=f"known are {', '.join(sorted(f.architecture for f in FAMILIES.values()))}",
        )
    for keys, name in ((LAYER_KEYS, "LAYERS"), (EXPERT_KEYS, "EXPERTS")):
        for number in (config.get(key) for key in keys):
            if isinstance(number, int):  # transformers makes lists of this length before anyone looks at them
                check_limit(name, number, where, CheckpointError)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise CheckpointError(
            f"{where}: its weights are quantised ({method})", hint="convert the checkpoint in bf16, fp16 or fp32"
        )
    return family


def model_section(family: Family, path) -> Model:
    """The model section of a Hugging Face folder; transformers fills in what config.json leaves out.

    Raises:
        CheckpointError: the config is invalid, or the model cannot be expressed exactly.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        return Model(**family.model(config))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.args[0]}", hint=error.hint) from error
    except Exception as error:  # whatever transformers, strict typing or arithmetic make of a wrong config
        raise CheckpointError(
            f"{path}/config.json: {type(error).__name__}: {str(error)[:1000]}",
            hint=f"it does not describe a {family.architecture}; copy it again",
        ) from error


def config_of(model: Model, family_name: str | None, origin: dict | None = None) -> tuple[Family, dict]:
    """A family that computes exactly this model, and its config.json.

    Args:
        family_name: a model_type to use; None takes the first that fits.
        origin: config.json of a model that this one was cut out of: its family comes first, with what else it says.

    Raises:
        CheckpointError: none fits, or the named one does not.
    """
    from transformers import AutoConfig

    if family_name is not None and family_name not in FAMILIES:
        raise CheckpointError(f"there is no family {family_name!r}", hint=f"known are {', '.join(sorted(FAMILIES))}")
    bare = model.model_copy(update={"hidden_dropout": 0.0, "attention_dropout": 0.0})
    bare = bare.model_copy(update={"num_query_groups": model.num_query_groups or model.num_attention_heads})
    differences, candidates = {}, [({}, family) for family in FAMILIES.values()]
    if origin is not None:
        candidates.insert(0, (origin, FAMILIES[origin["model_type"]]))
    for said, family in candidates:
        if family.config is None or family_name not in (None, family.model_type):
            continue
        fields = said | family.config(model) | {"model_type": family.model_type}
        try:
            config = AutoConfig.for_model(**fields)
            again = Model(**family.model(config))
        except Exception as error:  # as in model_section
            differences[family.model_type] = str(error)
            continue
        if again.kv_channels is None and bare.kv_channels == bare.hidden_size // bare.num_attention_heads:
            again = again.model_copy(update={"kv_channels": bare.kv_channels})
        if family.adds_gain and bare.norm_zero_centered:
            again = again.model_copy(update={"norm_zero_centered": True})
        if again == bare:
            return family, config.to_dict() | {"architectures": [family.architecture]}
        wrong = [key for key in type(bare).model_fields if getattr(bare, key) != getattr(again, key)]
        differences[family.model_type] = ", ".join(f"{k} {getattr(bare, k)} becomes {getattr(again, k)}" for k in wrong)
    shown = "\n  ".join(f"{name}: {text}" for name, text in sorted(differences.items(), key=lambda pair: len(pair[1])))
    raise CheckpointError(
        f"no Hugging Face architecture computes exactly this model:\n  {shown or 'the family has no writer'}",
        hint="export to .nemo, or train a model of one of these families",
    )
