"""Which parts of a model do something: magnitudes of activations over data, collected while it runs.

For a channel (or head, or expert) and a sample, m is the mean over the sample's tokens of what it gives: its absolute
value after a norm or before the projection that ends a block; the L2 norm of a head's output; the weight that the
router gives an expert. Its importance is the root of the mean over samples of m squared. Two are means over tokens:
1 - cosine of a layer's input and output, and an expert's inner channels, which see the tokens that are sent to them.

Sources: Muralidharan et al. 2024, arXiv:2407.14679, section 2.2 (the aggregation that it finds best: L2 over samples,
mean over the sequence); Men et al. 2024, arXiv:2403.03853 (block influence).

Legend: S sequence, B samples of a micro-batch, H hidden, C channels of whatever, N query heads, G groups, E experts.
"""

import functools

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megakd.config import Model
from megakd.models.gpt import GPT
from megakd.models.micro_batch import MicroBatch
from megakd.pruning.sizes import sizes_of

MEANS = ("num_layers", "expert_ffn_hidden_size")  # over tokens; the others are roots of means of squares over samples


class Importance:
    """Collects them with hooks on a model that runs forward; use as a `with` block.

    Every rank adds what it sees into arrays of the whole model's size: sums, and how many were summed. What several
    ranks see alike is in both, so one sum over all ranks and one division give the same at every layout.

    Args:
        gpt: this rank's part of the model, built of Megatron's local layers.
        keys: of the prune section: which importances are wanted.
    Collectives: under sequence parallelism, forwards of norms and routers all-reduce [B, C] over tp.
    """

    def __init__(self, gpt: GPT, keys: set[str]):
        self.gpt, self.model, self.keys = gpt, gpt.config.model, keys
        self.groups, self.device = gpt.pg_collection, next(gpt.parameters()).device
        shapes = {key: shape for key, shape in array_shapes(self.model).items() if key in keys}
        new = functools.partial(torch.zeros, dtype=torch.float64, device=self.device)
        self.sums = {key: new(shape) for key, shape in shapes.items()}
        self.counts = {key: new(shape) for key, shape in shapes.items()}
        self.masks_SB: list[Tensor] = []
        self.turn, self.hooks = -1, []

    def __enter__(self) -> "Importance":
        self.hooks = [self.gpt.register_forward_pre_hook(self._next_micro_batch)]
        for layer in self.gpt.decoder.layers:
            self._watch(layer, layer.layer_number - 1)
        if "hidden_size" in self.keys and self.gpt.decoder.final_layernorm is not None:
            self._after(self.gpt.decoder.final_layernorm, self._hidden, 2 * self.model.num_layers)
        return self

    def __exit__(self, *_) -> None:
        for hook in self.hooks:
            hook.remove()

    def begin(self, micro_batches: list[MicroBatch]) -> None:
        """Before the model runs these, in order; what fills rows up is not counted."""
        self.turn, self.masks_SB = -1, [real_tokens(micro_batch) for micro_batch in micro_batches]

    def result(self) -> dict[str, Tensor]:
        """The importances by key, on the CPU, in the shapes of `megakd.pruning.choose.Kept.parts`; nan where a layer
        has no such part.

        Collectives: two all-reduces of each array over all ranks.
        """
        found = {}
        for key, sums in self.sums.items():
            for array in (sums, self.counts[key]):
                dist.all_reduce(array)
            mean = sums / self.counts[key]
            found[key] = (mean if key in MEANS else mean.sqrt()).cpu()
        if "hidden_size" in found:
            found["hidden_size"] = found["hidden_size"].nanmean(0)
        if "num_query_groups" in found:
            found["num_query_groups"] = found["num_query_groups"].unflatten(1, (self.query_groups, -1)).mean(2)
        return found

    @property
    def query_groups(self) -> int:
        return sizes_of(self.model)["num_query_groups"]

    def _watch(self, layer, number: int) -> None:
        keys, block = self.keys, layer.mlp
        if "num_layers" in keys:
            hook = functools.partial(self._influence, number)
            self.hooks.append(layer.register_forward_hook(hook, with_kwargs=True))
        if "hidden_size" in keys:
            self._after(layer.input_layernorm, self._hidden, 2 * number)
            self._after(layer.pre_mlp_layernorm, self._hidden, 2 * number + 1)
        if "num_query_groups" in keys:
            self._before(layer.self_attention.linear_proj, self._heads, number)
        if not self.model.has_experts(number):
            if "ffn_hidden_size" in keys:
                self._before(block.linear_fc2, self._inner, "ffn_hidden_size", number)
            return
        if "shared_ffn_hidden_size" in keys:
            self._before(block.shared_experts.linear_fc2, self._inner, "shared_ffn_hidden_size", number)
        if keys & {"num_experts", "expert_ffn_hidden_size"}:
            self._after(block.router, self._router, number)
        if "expert_ffn_hidden_size" in keys:
            own = block.experts.local_experts
            for place, expert in enumerate(own, start=self.groups.ep.rank() * len(own)):
                self._before(expert.linear_fc2, self._expert, number, place)

    def _after(self, module, function, *where) -> None:
        self.hooks.append(module.register_forward_hook(lambda _, inputs, output: function(*where, output)))

    def _before(self, module, function, *where) -> None:
        self.hooks.append(module.register_forward_pre_hook(lambda _, inputs: function(*where, inputs[0])))

    def _next_micro_batch(self, *_) -> None:
        self.turn += 1

    @property
    def mask_SB(self) -> Tensor:
        return self.masks_SB[self.turn]

    def own(self, mask_SB: Tensor) -> Tensor:
        """The positions that this rank's norms see."""
        tp = self.groups.tp
        return mask_SB.chunk(tp.size())[tp.rank()] if self.gpt.config.sequence_parallel else mask_SB

    def _influence(self, number: int, layer, args, kwargs, output) -> None:
        before_SBH = (args[0] if args else kwargs["hidden_states"]).float()
        mask_SB = self.own(self.mask_SB)
        distance_SB = 1 - F.cosine_similarity(before_SBH, output[0].float(), dim=-1)
        self.sums["num_layers"][number] += distance_SB[mask_SB].double().sum()
        self.counts["num_layers"][number] += mask_SB.sum()

    def _hidden(self, number: int, output_SBH: Tensor) -> None:
        self._add("hidden_size", number, slice(None), output_SBH.abs(), cut=True)

    def _heads(self, number: int, input_SBC: Tensor) -> None:
        norms_SBN = input_SBC.float().unflatten(-1, (-1, self.model.head_channels)).norm(dim=-1)
        self._add("num_query_groups", number, self.own_columns(norms_SBN, self.groups.tp), norms_SBN)

    def _inner(self, key: str, number: int, input_SBC: Tensor) -> None:
        self._add(key, number, self.own_columns(input_SBC, self.groups.tp), input_SBC.abs())

    def _router(self, number: int, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Also keeps what fills rows up from the experts; it comes last, so no other token sees it."""
        weights_TE, chosen_TE = output
        mask_SB = self.own(self.mask_SB)
        if "num_experts" in self.keys:
            weights_SBE = weights_TE.view(*mask_SB.shape, -1)
            self._add("num_experts", number, slice(None), weights_SBE, cut=True)
        return weights_TE, chosen_TE & mask_SB.flatten()[:, None]

    def _expert(self, number: int, expert: int, input_TC: Tensor) -> None:
        columns = self.own_columns(input_TC, self.groups.expt_tp)
        self.sums["expert_ffn_hidden_size"][number, expert, columns] += input_TC.float().abs().sum(0).double()
        self.counts["expert_ffn_hidden_size"][number, expert, columns] += len(input_TC)

    @staticmethod
    def own_columns(own, tp) -> slice:
        """Where this rank's columns are among those of all."""
        width = own.shape[-1]
        return slice(tp.rank() * width, (tp.rank() + 1) * width)

    def _add(self, key: str, number: int, columns: slice, magnitudes_SBC: Tensor, *, cut: bool = False) -> None:
        """The squared means of a micro-batch's samples.

        Args:
            cut: under sequence parallelism this rank has a part of the positions.
        """
        mask_SB = self.own(self.mask_SB) if cut else self.mask_SB
        sums_BC = torch.einsum("sbc,sb->bc", magnitudes_SBC.float(), mask_SB.float())
        if cut and self.gpt.config.sequence_parallel:
            dist.all_reduce(sums_BC, group=self.groups.tp)
        tokens_B = self.mask_SB.sum(0)
        means_BC = sums_BC.double() / tokens_B.clamp(min=1)[:, None]
        self.sums[key][number, columns] += means_BC.square().sum(0)
        self.counts[key][number, columns] += (tokens_B > 0).sum()


def array_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Of what is summed, by key: hidden channels after every norm, query heads by themselves."""
    layers, sizes = model.num_layers, sizes_of(model)
    shapes = {key: (layers, size) for key, size in sizes.items()}
    shapes |= {"num_layers": (layers,), "hidden_size": (2 * layers + 1, model.hidden_size)}
    shapes["num_query_groups"] = (layers, model.num_attention_heads)
    if model.moe is not None:
        shapes["expert_ffn_hidden_size"] = (layers, sizes["num_experts"], sizes["expert_ffn_hidden_size"])
    return shapes


def real_tokens(micro_batch: MicroBatch) -> Tensor:
    """[S, B] True where a sample's token is, not what fills its row up."""
    mask_BS = torch.zeros_like(micro_batch.ids_BS, dtype=torch.bool)
    for row, start, stop in micro_batch.parts():
        mask_BS[row, start:stop] = True
    return mask_BS.T.contiguous()
