"""What transformers computes from a Hugging Face folder, with one module's weights in memory at a time.

Legend: P prompts, S sequence, H hidden, V vocabulary, L layers.
"""

import dataclasses
import pathlib
import re

import torch
from torch import Tensor
from torch.nn import Module, ModuleList

from megakd.converters.huggingface.importing import HuggingFaceModel, open_hf
from megakd.converters.parity.streaming import parameters_on_meta, put, take_away
from megakd.errors import CheckpointError
from megakd.progress import progress_bar

FUSED = re.compile(r"(?P<experts>.*\.experts)\.(?P<what>gate_up_proj|down_proj)$")
EXPERT_NAMES = {  # transformers holds all experts of a layer in two tensors; files have them one by one
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}


@dataclasses.dataclass(frozen=True)
class Reference:
    """What transformers makes of the prompts, in float32.

    Attributes:
        logits_PSV: its logits.
        layers: input and output [P, S, H] of every layer.
    """

    logits_PSV: Tensor
    layers: list[tuple[Tensor, Tensor]]


class HuggingFaceReference:
    """A transformers model that reads each module's weights when it runs and drops them after.

    Args:
        path: the folder.
        attention: transformers' name of the implementation, "eager" or "sdpa".
    """

    def __init__(self, path: pathlib.Path, attention: str = "eager"):
        import transformers

        self.opened: HuggingFaceModel = open_hf(path)
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        architecture = getattr(transformers, self.opened.family.architecture)
        with parameters_on_meta():
            self.model = architecture._from_config(config, attn_implementation=attention, dtype=torch.float32).eval()
        self.layers = decoder_layers(self.model, self.opened.model.num_layers)
        self.persistent = set(self.model.state_dict())
        self.names = renamed_names(self.model, self.opened)

    @torch.no_grad()
    def run(self, ids_PS: Tensor, *, progress: bool = False) -> Reference:
        """Run the prompts; weights pass through memory once.

        Raises:
            CheckpointError: transformers wants a tensor that the files do not have.
        """
        records: list[tuple[Tensor, Tensor]] = []
        hooks = []
        for name, module in self.model.named_modules():
            if module._parameters or any(f"{name}.{leaf}" in self.persistent for leaf in module._buffers):
                hooks.append(module.register_forward_pre_hook(lambda m, args, name=name: self._fill(name, m)))
                hooks.append(module.register_forward_hook(lambda m, args, output: take_away(m)))
        with progress_bar(len(self.layers), "verifying: transformers", shown=progress) as bar:

            def record(layer: Module, args, kwargs, output) -> None:
                hidden = args[0] if args else kwargs["hidden_states"]
                records.append((hidden.clone(), (output[0] if isinstance(output, tuple) else output).clone()))
                bar.update()

            hooks += [layer.register_forward_hook(record, with_kwargs=True) for layer in self.layers]
            try:
                logits_PSV = self.model(input_ids=ids_PS, use_cache=False).logits.float()
            finally:
                for hook in hooks:
                    hook.remove()
        return Reference(logits_PSV, records)

    def _fill(self, path: str, module: Module) -> None:
        prefix = f"{path}." if path else ""
        for leaf in [*module._parameters, *(b for b in module._buffers if f"{prefix}{b}" in self.persistent)]:
            if module._parameters.get(leaf) is not None or leaf in module._buffers:
                put(self.model, prefix + leaf, self._load(prefix + leaf))

    def _load(self, name: str) -> Tensor:
        """The tensor of a transformers parameter, float32."""
        opened = self.opened
        if name in self.names:
            return as_float(opened.load(self.names[name]))
        source = getattr(self.model, "all_tied_weights_keys", {}).get(name)
        if source in self.names:
            return as_float(opened.load(self.names[source]))
        if fused := FUSED.match(name):
            return self._experts(fused["experts"], fused["what"])
        raise CheckpointError(
            f"{opened.folder.path}: transformers wants {name}, the files do not have it",
            hint="this transformers names the weights in a way the gate does not know; --no-verify converts without it",
        )

    def _experts(self, experts: str, what: str) -> Tensor:
        for parts in EXPERT_NAMES[what]:
            if f"{experts}.0.{parts[0]}.weight" in self.names:
                names = [[f"{experts}.{e}.{p}.weight" for p in parts] for e in range(self.opened.model.moe.num_experts)]
                return torch.stack(
                    [torch.cat([as_float(self.opened.load(self.names[n])) for n in row]) for row in names]
                )
        raise CheckpointError(f"{self.opened.folder.path}: the experts of {experts} are not found under a known name")


def renamed_names(model: Module, opened: HuggingFaceModel) -> dict[str, str]:
    """transformers' own names of the tensors -> names in the tables; transformers 5 renames some when it loads."""
    names = {name: name for name in opened.names}
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # transformers 4 loads the names as they are
        return names
    for renaming in get_model_conversion_mapping(model):
        if isinstance(renaming, WeightRenaming):
            names = {renaming.rename_source_key(theirs)[0]: ours for theirs, ours in names.items()}
    return names


def as_float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def decoder_layers(model: Module, number: int) -> ModuleList:
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, ModuleList)]
    return min(((n, m) for n, m in found if len(m) == number), key=lambda pair: pair[0].count("."))[1]
