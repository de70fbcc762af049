"""The parity gate: fixed prompts through transformers and through our GPT, layer by layer, compared in float32.

1. The other side runs the prompts: transformers (hf_reference.py), or for a .nemo plain PyTorch (nemo_reference.py);
   input and output of every layer and the logits are kept.
2. Our GPT, at the layout asked for, runs the same prompts; each rank reads its shards of a layer from the
   torch_dist folder when its turn comes, and drops them after. The layer also runs on the reference's input alone.
3. The largest difference of a logit must be below the bound. Argmax agreement is not looked at: a quarter of known
   mistakes keep it at 100 %.

Legend: P prompts, S sequence, B = P in Megatron's order of axes, H hidden, V vocabulary.
"""

import contextlib
import dataclasses
import pathlib

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensorFactory,
    apply_factories,
    apply_factory_merges,
)
from torch import Tensor

from megakd.checkpoints.folder import Checkpoint
from megakd.checkpoints.loading import read_shard
from megakd.checkpoints.torch_dist import sharding_metadata
from megakd.checkpoints.torch_dist_reader import TorchDistReader
from megakd.config import Model, Parallel, Train
from megakd.converters.huggingface.reference import HuggingFaceReference, Reference
from megakd.converters.nemo.archive import CONFIG
from megakd.converters.nemo.reference import NemoReference
from megakd.converters.parity.streaming import parameters_on_meta, put, take_away
from megakd.errors import CheckpointError
from megakd.models.gpt import build_gpt, padded_vocab_size
from megakd.progress import progress_bar

PROMPTS, LENGTH, SEED = 4, 48, 20_240_607
BOUND = 1e-4  # of a logit's difference, up to SHALLOW layers; correct conversions stay below 3e-5, mistakes above 1e-3
SHALLOW = 8
DEEP_BOUND = 1e-3  # at most, for deeper models
DEEP_FACTOR = 10  # times transformers' own difference between two implementations of attention
LAYER_BOUND = 1e-4  # of a deep model's single layer, relative to the largest value of its output


@dataclasses.dataclass(frozen=True)
class Parity:
    """What the gate found.

    Attributes:
        bound: largest difference of a logit that passes.
        differences: the largest of each prompt.
        layers: largest difference of each layer on the reference's input, relative to its output's largest value.
        logit_std: standard deviation of the reference's logits: what the differences compare with.
        own_difference: transformers' eager against sdpa; None up to SHALLOW layers and where there is no sdpa.
        tp: tensor parallel size on our side.
    """

    bound: float
    differences: list[float]
    layers: list[float]
    logit_std: float
    own_difference: float | None
    tp: int

    @property
    def passed(self) -> bool:
        deep = len(self.layers) > SHALLOW
        layers_pass = not deep or all(x <= LAYER_BOUND for x in self.layers)
        return layers_pass and all(x <= self.bound for x in self.differences)

    def report(self) -> str:
        """One line a prompt, and the worst layer."""
        lines = [
            f"prompt {i}: largest difference of a logit {x:.2e} ({'pass' if x <= self.bound else 'FAIL'})"
            for i, x in enumerate(self.differences)
        ]
        worst = max(range(len(self.layers)), key=lambda i: self.layers[i])
        first = next((i for i, x in enumerate(self.layers) if not x <= LAYER_BOUND), None)
        lines.append(f"layers alone: worst {self.layers[worst]:.2e} of its output's maximum (layer {worst})")
        if first is not None:
            lines.append(f"first layer above {LAYER_BOUND:.0e}: {first} ({self.layers[first]:.2e})")
        own = "" if self.own_difference is None else f", transformers eager against sdpa {self.own_difference:.2e}"
        lines.append(f"bound {self.bound:.2e}, logits' standard deviation {self.logit_std:.2f}, TP {self.tp}{own}")
        return "\n".join(lines)


def prompts(model: Model) -> Tensor:
    """[P, S] ids, the same for every model of one vocabulary and length."""
    generator = torch.Generator().manual_seed(SEED)
    length = min(LENGTH, model.max_sequence_length)
    return torch.randint(model.vocab_size, (PROMPTS, length), generator=generator)


def reference_of(path: pathlib.Path, model: Model, *, progress: bool = False) -> tuple[Reference, float | None]:
    """The other side's answer, and for a deep transformers model how far its kinds of attention are apart."""
    if (path / CONFIG).is_file():
        return NemoReference(path, model).run(prompts(model), progress=progress), None
    reference = HuggingFaceReference(path)
    ids_PS = prompts(model)
    eager = reference.run(ids_PS, progress=progress)
    if len(reference.layers) <= SHALLOW or reference.opened.model.attention_softcap is not None:
        return eager, None  # sdpa knows no soft cap, so there is nothing to compare with
    sdpa = HuggingFaceReference(path, "sdpa").run(ids_PS, progress=progress)
    return eager, (eager.logits_PSV - sdpa.logits_PSV).abs().max().item()


def logit_bound(layers: int, own_difference: float | None) -> float:
    if layers <= SHALLOW:
        return BOUND
    if own_difference is None:
        return DEEP_BOUND
    return min(max(BOUND, DEEP_FACTOR * own_difference), DEEP_BOUND)


class StreamedGpt:
    """Our GPT whose layers are loaded from a checkpoint folder, through Megatron, while they run.

    Collectives: loading and running are collective over the groups.
    """

    def __init__(self, checkpoint: Checkpoint, groups):
        model = checkpoint.model
        self.checkpoint, self.groups, self.model = checkpoint, groups, model
        train = Train(steps=1, global_batch_size=1, precision="fp32")
        parallel = Parallel(tp=groups.tp.size(), pp=1)
        padded = padded_vocab_size(model.vocab_size)
        sizes = {"vocab_size": model.vocab_size, "padded_size": padded}
        with parameters_on_meta():
            self.gpt = build_gpt(model, parallel, train, groups, **sizes, device="meta", seed=None).eval()
        self.sharded = self.gpt.sharded_state_dict(metadata=sharding_metadata(groups))
        self.reader = TorchDistReader(checkpoint.path, checkpoint.files)

    def fill(self, prefix: str) -> None:
        """Read this rank's parts of the parameters whose names start with `prefix`, as Megatron describes them."""
        parts = {k: v for k, v in self.sharded.items() if k.startswith(prefix) and not isinstance(v, ShardedObject)}
        factories = {k: v for k, v in parts.items() if isinstance(v, ShardedTensorFactory)}
        apply_factories(parts)
        dict_list_map_inplace(lambda part: read_shard(self.reader, dataclasses.replace(part, data=None)), parts)
        for name, tensor in apply_factory_merges(parts, factories).items():
            put(self.gpt, name, tensor)

    @contextlib.contextmanager
    def filled(self, prefix: str):
        self.fill(prefix)
        yield
        take_away(self.gpt.get_submodule(prefix.removesuffix(".")))

    @torch.no_grad()
    def run(self, ids_PS: Tensor, reference: Reference | None, *, progress: bool = False) -> tuple[Tensor, list[float]]:
        """Logits of this rank's columns [S * P, W], and each layer's difference on the reference's input.

        Args:
            reference: on rank 0; the others pass None.
        """
        alone: list[float] = []
        hooks = []
        for name in ("embedding", "decoder.final_layernorm"):
            module = self.gpt.get_submodule(name)
            hooks.append(module.register_forward_pre_hook(lambda m, args, name=name: self.fill(name + ".")))
            hooks.append(module.register_forward_hook(lambda m, args, output: take_away(m)))
        with progress_bar(self.model.num_layers, "verifying: megakd", shown=progress) as bar:

            def compare(layer, args, kwargs, output):
                alone.append(self._alone(layer, kwargs, reference, len(alone), output[0].shape))
                take_away(layer)
                bar.update()

            for i, layer in enumerate(self.gpt.decoder.layers):
                hooks.append(layer.register_forward_pre_hook(lambda m, args, i=i: self.fill(f"decoder.layers.{i}.")))
                hooks.append(layer.register_forward_hook(compare, with_kwargs=True))
            try:
                positions = torch.arange(ids_PS.shape[1]).expand_as(ids_PS)
                hidden_SBH = self.gpt(ids_PS, positions, None)
            finally:
                for hook in hooks:
                    hook.remove()
        head = "embedding.word_embeddings" if self.model.tie_embeddings else "output_layer"
        with self.filled(head + "."):
            return self.gpt.logits(hidden_SBH), alone

    def _alone(self, layer, kwargs, reference: Reference | None, number: int, shape) -> float:
        """Run a layer on the reference's input; rank 0 compares, the others get nan."""
        hidden_SBH = torch.empty(shape)
        if reference is not None:
            hidden_SBH.copy_(reference.layers[number][0].transpose(0, 1))
        dist.broadcast(hidden_SBH, src=0)
        output_SBH = layer.forward(**{**kwargs, "hidden_states": hidden_SBH})[0]
        if reference is None:
            return float("nan")
        wanted_SBH = reference.layers[number][1].transpose(0, 1)
        largest = wanted_SBH.abs().max().clamp(min=torch.finfo(torch.float32).tiny)  # a layer of zeros is no difference
        return ((output_SBH - wanted_SBH).abs().max() / largest).item()


def compare(path: pathlib.Path, checkpoint: Checkpoint, groups, *, progress: bool = False) -> Parity:
    """Compare a Hugging Face folder, or an unpacked .nemo, with a checkpoint folder; the same result on every rank.

    Args:
        groups: tensor parallel over all ranks.
    Collectives: those of a forward pass; all-gather of the logits; all ranks call it.
    """
    rank_0 = dist.get_rank() == 0
    reference, own = None, None
    failure = [None]
    if rank_0:
        try:
            reference, own = reference_of(path, checkpoint.model, progress=progress)
        except Exception as error:  # told to every rank, so that none waits for the first
            failure = [error]
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise failure[0]
    ids_PS = prompts(checkpoint.model)
    logits_TW, alone = StreamedGpt(checkpoint, groups).run(ids_PS, reference, progress=progress and rank_0)
    parts = [torch.empty_like(logits_TW) for _ in range(groups.tp.size())]
    dist.all_gather(parts, logits_TW, group=groups.tp)
    result = [None]
    if rank_0:
        logits_SPV = torch.cat(parts, 1)[:, : checkpoint.model.vocab_size].unflatten(0, (ids_PS.shape[1], -1))
        difference_P = (logits_SPV.transpose(0, 1) - reference.logits_PSV).abs().amax((1, 2))
        bound = logit_bound(checkpoint.model.num_layers, own)
        std = reference.logits_PSV.std().item()
        result = [Parity(bound, difference_P.tolist(), alone, std, own, groups.tp.size())]
    dist.broadcast_object_list(result, src=0)
    return result[0]


def check(path: pathlib.Path, checkpoint: Checkpoint, groups, *, progress: bool = False) -> Parity:
    """As `compare`.

    Raises:
        CheckpointError: the difference is above the bound, with a line for each prompt.
    """
    parity = compare(path, checkpoint, groups, progress=progress)
    if not parity.passed:
        raise CheckpointError(
            f"{path} and its conversion compute different logits:\n  " + parity.report().replace("\n", "\n  "),
            hint="the conversion was thrown away; please report this with config.json",
        )
    return parity
