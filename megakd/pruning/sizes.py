"""What is left of a model: which of its sizes can be cut, the student's section, and what cannot be asked for."""

from collections.abc import Iterator

from megakd.config import Model, Parallel, Prune
from megakd.config.prune import SIZES
from megakd.planning.parameters import layer_parameters, whole_parameters

WORDS = {
    "num_layers": "layers",
    "hidden_size": "hidden channels",
    "num_query_groups": "query groups",
    "ffn_hidden_size": "feed-forward channels",
    "num_experts": "experts of a layer",
    "expert_ffn_hidden_size": "channels of an expert",
    "shared_ffn_hidden_size": "channels of shared experts",
}
LACKING = {
    "num_query_groups": "attention is latent, whose heads share what they are made of; expected null",
    "ffn_hidden_size": "every layer has experts instead; expected null, or expert_ffn_hidden_size",
    "num_experts": "the model has no experts; expected null",
    "expert_ffn_hidden_size": "the model has no experts; expected null",
    "shared_ffn_hidden_size": "the model has no shared experts; expected null",
}
OVER_TP = ("num_query_groups", "ffn_hidden_size", "expert_ffn_hidden_size", "shared_ffn_hidden_size")


def sizes_of(model: Model) -> dict[str, int]:
    """How much there is of what can be cut, by keys of the prune section."""
    sizes = {"num_layers": model.num_layers, "hidden_size": model.hidden_size}
    if model.mla is None:
        sizes["num_query_groups"] = model.num_query_groups or model.num_attention_heads
    if not all(map(model.has_experts, range(model.num_layers))):
        sizes["ffn_hidden_size"] = model.ffn_hidden_size
    if model.moe is not None:
        sizes |= {"num_experts": model.moe.num_experts, "expert_ffn_hidden_size": model.moe.ffn_hidden_size}
        if model.moe.shared_ffn_hidden_size:
            sizes["shared_ffn_hidden_size"] = model.moe.shared_ffn_hidden_size
    return sizes


def cuts_of(model: Model, wanted: Prune) -> dict[str, int]:
    """Of those sizes the ones that get smaller by importance, and how much is left of them."""
    sizes = sizes_of(model)
    asked = {key: getattr(wanted, key) for key in SIZES if key in sizes}
    return {key: left for key, left in asked.items() if left is not None and left < sizes[key]}


def named_layers(model: Model, wanted: Prune) -> list[int] | None:
    """The layers that are left where they are known without an importance; else None."""
    if wanted.num_layers is not None and wanted.num_layers < model.num_layers:
        return None
    kept = wanted.keep_layers or range(model.num_layers)
    return sorted(set(kept) - set(wanted.drop_layers))


def problems(model: Model, wanted: Prune, tp: int) -> Iterator[tuple[str, str]]:
    """Yields (key of the prune section, what is wrong) with cutting a model so.

    Args:
        tp: what the student's sizes must be divisible by.
    """
    sizes = sizes_of(model)
    found = [*_size_problems(model, wanted, sizes), *_layer_problems(model, wanted)]
    if not found and not cuts_of(model, wanted) and len(named_layers(model, wanted)) == model.num_layers:
        offered = ", ".join(f"{key} below {size}" for key, size in sizes.items())
        found = [("num_layers", f"nothing is asked to be left out; expected {offered}, keep_layers or drop_layers")]
    if not found:
        for key, size in sizes_of(narrowed(model, wanted)).items():
            if key in OVER_TP and size % tp:
                nearest = " or ".join(str(n) for n in (size // tp * tp, -(-size // tp) * tp) if 0 < n <= sizes[key])
                found.append((key, f"{size} is not divisible by tp = {tp}; expected {nearest or 'a smaller tp'}"))
    yield from found


def _size_problems(model: Model, wanted: Prune, sizes: dict[str, int]) -> Iterator[tuple[str, str]]:
    moe = model.moe
    for key in SIZES:
        left = getattr(wanted, key)
        if left is None:
            continue
        if key not in sizes:
            yield key, f"{left}, but {LACKING[key]}"
        elif left > sizes[key]:
            yield key, f"{left}, but the model has {sizes[key]} {WORDS[key]}"
        elif key == "num_query_groups" and left < sizes[key] and model.qk_norm_over == "all_heads":
            yield key, f"{left}, but queries and keys have a norm over all heads, which fewer would change"
        elif key == "num_experts" and left < moe.top_k:
            yield key, f"{left}, but a token is sent to {moe.top_k} of them"
        elif key == "num_experts" and left < sizes[key] and moe.num_groups is not None:
            yield key, f"{left}, but experts are chosen from {moe.num_groups} groups of one size; expected null"


def _layer_problems(model: Model, wanted: Prune) -> Iterator[tuple[str, str]]:
    for key in ("keep_layers", "drop_layers"):
        if outside := [i for i in getattr(wanted, key) if i >= model.num_layers]:
            yield key, f"layers {outside} do not exist; there are {model.num_layers}, counted from 0"
    if wanted.drop_layers and named_layers(model, wanted) == []:
        yield "drop_layers", f"all {model.num_layers} layers; none would be left"


def narrowed(model: Model, wanted: Prune) -> Model:
    """The section with all of its layers, each as wide as it is asked to be."""
    cuts = cuts_of(model, wanted)
    changes = {key: cuts[key] for key in ("hidden_size", "ffn_hidden_size") if key in cuts}
    heads = model.num_attention_heads
    if groups := cuts.get("num_query_groups"):
        heads = heads // sizes_of(model)["num_query_groups"] * groups
        changes |= {"num_attention_heads": heads, "num_query_groups": model.num_query_groups and groups}
    if model.mla is None and changes.keys() & {"hidden_size", "num_attention_heads"}:
        as_usual = changes.get("hidden_size", model.hidden_size) == heads * model.head_channels
        changes["kv_channels"] = None if as_usual else model.head_channels
    if model.moe is not None:
        keys = {"num_experts": "num_experts", "expert_ffn_hidden_size": "ffn_hidden_size"}
        keys |= {"shared_ffn_hidden_size": "shared_ffn_hidden_size"}
        of_experts = {theirs: cuts[key] for key, theirs in keys.items() if key in cuts}
        changes["moe"] = model.moe.model_dump() | of_experts
    return Model.model_validate(model.model_dump() | changes)


def with_layers(model: Model, layers: list[int]) -> Model:
    """The section with these of its layers alone; what it says of single layers goes by their new numbers."""
    new = {layer: number for number, layer in enumerate(layers)}

    def left(numbers: list[int]) -> list[int]:
        return [new[layer] for layer in numbers if layer in new]

    changes = {"num_layers": len(layers), "no_rope_layers": left(model.no_rope_layers)}
    if model.sliding_window_layers is not None:
        changes["sliding_window_layers"] = left(model.sliding_window_layers)
        if not changes["sliding_window_layers"]:
            changes |= dict.fromkeys(("sliding_window", "sliding_window_layers", "sliding_window_rotary_base"))
    if model.moe is not None and model.moe.layers is not None:
        of_experts = left(model.moe.layers)
        changes["moe"] = model.moe.model_dump() | {"layers": of_experts} if of_experts else None
    return Model.model_validate(model.model_dump() | changes)


def table(model: Model, wanted: Prune, layers: list[int] | None = None) -> str:
    """Sizes and parameters of a model and its student.

    Args:
        layers: that are left; None where they are not chosen yet.
    """
    layers = named_layers(model, wanted) if layers is None else layers
    narrow, left = narrowed(model, wanted), wanted.num_layers if layers is None else len(layers)
    rows = [("", "teacher", "student")]
    now = sizes_of(narrow) | {"num_layers": left}
    for key, size in sizes_of(model).items():
        words = WORDS[key]
        if key == "num_query_groups":
            words += f" of {model.num_attention_heads // size} heads, {model.head_channels} channels each"
        rows.append((words, f"{size:,}", f"{now[key]:,}" if now[key] != size else "="))
    whole = whole_parameters(model)
    few, many = bounds(narrow, layers, left)
    students = f"{few:,}" if few == many else f"{few:,} to {many:,}"
    rows.append(("parameters", f"{whole:,}", f"{students} ({many / whole:.0%})"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join([row[0].ljust(widths[0]), row[1].rjust(widths[1]), row[2].rjust(widths[2])]) for row in rows]
    return "\n".join(lines)


def bounds(narrow: Model, layers: list[int] | None, left: int) -> tuple[int, int]:
    """Parameters of the student: fewest and most, which differ while it is open which of unlike layers are left."""
    of_layers = [layer_parameters(narrow, layer, Parallel()).total for layer in range(narrow.num_layers)]
    rest = whole_parameters(narrow) - sum(of_layers)
    if layers is not None:
        of_layers = [of_layers[layer] for layer in layers]
    of_layers.sort()
    return rest + sum(of_layers[:left]), rest + sum(of_layers[-left:])
