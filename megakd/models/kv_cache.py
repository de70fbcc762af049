"""Keys and values of sequences under way, so that a step computes the new tokens alone and not their prefixes.

The new tokens of a step are one row, whatever sequences they belong to: Megatron sees one sequence of T tokens, the
rotation takes each token's own position, and attention (`SdpaAttention`) hands its keys and values over to here. So
sequences of any lengths go through a model together, and nothing of Megatron's inference engines is needed, whose
kernels are CUDA's.

Legend: T new tokens of a step, C slots, L places of a slot, N heads, G query groups of this rank, D channels of a head.
"""

import dataclasses

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from megakd.models.attention import SdpaAttention

LEAST_PLACES = 128


@dataclasses.dataclass(frozen=True)
class NewTokens:
    """The new tokens of a step, in the form of a micro-batch of one row.

    Attributes:
        ids_BS, position_ids_BS: int64 [1, T].
        prompts: (slot, length) of the whole prompts that the tokens are, one after the other; empty where they are the
            next tokens of slots 0, 1, 2, ... in order.
        longest: places that any of their sequences fills, these tokens included.
    """

    ids_BS: Tensor
    position_ids_BS: Tensor
    prompts: tuple[tuple[int, int], ...]
    longest: int
    packed = None  # they are no packed micro-batch to Megatron

    @property
    def own_ids_BS(self) -> Tensor:
        return self.ids_BS

    @property
    def positions_T(self) -> Tensor:
        return self.position_ids_BS[0]


def whole_prompts(prompts: list[tuple[int, list[int]]], device) -> NewTokens:
    """A step that reads prompts.

    Args:
        prompts: (slot, ids) of each.
    """
    ids = [token for _, prompt in prompts for token in prompt]
    positions = [place for _, prompt in prompts for place in range(len(prompt))]
    lengths = tuple((slot, len(prompt)) for slot, prompt in prompts)
    return NewTokens(
        torch.tensor([ids], device=device),
        torch.tensor([positions], device=device),
        lengths,
        max(length for _, length in lengths),
    )


def next_tokens(ids: list[int], positions: list[int], device) -> NewTokens:
    """A step that gives each of the first slots one more token."""
    return NewTokens(
        torch.tensor([ids], device=device), torch.tensor([positions], device=device), (), max(positions) + 1
    )


class KVCache:
    """Keys and values of one pipeline stage, while the `with` block lasts; meanwhile the model takes NewTokens only.

    Args:
        gpt: this rank's part of a model, of Megatron's local layers and without sequence parallelism.
        slots: sequences that are under way at once, at most.
        places: tokens of the longest sequence there can be; the memory follows those that there are.

    Attributes:
        step: the tokens of the forward pass that comes next; `begin` sets it.
    """

    def __init__(self, gpt, slots: int, places: int):
        assert not gpt.config.sequence_parallel, "the tokens of a step are not cut over ranks"
        self.slots, self.most_places, self.step = slots, places, None
        self.attentions = [module for module in gpt.modules() if isinstance(module, SdpaAttention)]
        self.layers = [LayerCache(self) for _ in self.attentions]
        self.rotations = [module for module in gpt.modules() if isinstance(module, RotaryEmbedding)]
        self.hooks: list = []
        self.slots_T, self.seen_by_window = None, {}

    def begin(self, step: NewTokens) -> None:
        """To be called before the forward pass of a step."""
        self.step, self.seen_by_window = step, {}
        self.slots_T = torch.arange(step.ids_BS.shape[1], device=step.ids_BS.device)

    def seen(self, window: int | None) -> Tensor:
        """Which places of its slot each next token sees, bool [T, 1, 1, L]: its own and those before, in the window."""
        if window not in self.seen_by_window:
            position_T1 = self.step.positions_T[:, None]
            place_L = torch.arange(self.step.longest, device=position_T1.device)
            seen_TL = place_L <= position_T1
            if window is not None:
                seen_TL &= place_L > position_T1 - window
            self.seen_by_window[window] = seen_TL[:, None, None]
        return self.seen_by_window[window]

    def __enter__(self) -> "KVCache":
        for attention, layer in zip(self.attentions, self.layers, strict=True):
            attention.cache = layer
        self.hooks = [module.register_forward_hook(self._rotate) for module in self.rotations]
        return self

    def __exit__(self, *_) -> None:
        for attention in self.attentions:
            attention.cache = None
        for hook in self.hooks:
            hook.remove()

    def copy(self, source: int, target: int, places: int) -> None:
        """Make the first places of a slot those of another."""
        for layer in self.layers:
            for stored in (layer.keys_CGLD, layer.values_CGLD):
                stored[target, :, :places] = stored[source, :, :places]

    def _rotate(self, module: RotaryEmbedding, args, output):
        """Forward hook: the angles of the step's positions instead of those of 0, 1, 2, ..."""
        table = module.forward(grown(self.step.longest, self.most_places))
        if isinstance(output, tuple):  # YaRN's, with its factor on the rotated channels
            return table[0].index_select(0, self.step.positions_T), output[1]
        return table.index_select(0, self.step.positions_T)


class LayerCache:
    """The part of one layer."""

    def __init__(self, cache: KVCache):
        self.cache = cache
        self.keys_CGLD = self.values_CGLD = None

    def attend(self, attention: SdpaAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[T, 1, N, D], [T, 1, G, D], [T, 1, G, D] -> [T, 1, N * D]; keys and values are kept."""
        step = self.cache.step
        self._reserve(grown(step.longest, self.cache.most_places), key, value)
        if step.prompts:
            lengths = [length for _, length in step.prompts]
            segments = list(zip(*(x.split(lengths) for x in (query, key, value)), strict=True))
            for (slot, length), (_, k, v) in zip(step.prompts, segments, strict=True):
                self.keys_CGLD[slot, :, :length] = k[:, 0].transpose(0, 1)
                self.values_CGLD[slot, :, :length] = v[:, 0].transpose(0, 1)
            return torch.cat([attention.attend(*segment, None, causal=True) for segment in segments])
        return self._attend_next(attention, query, key, value)

    def _attend_next(self, attention: SdpaAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One query of each sequence: the heads of a group are so many queries of that group's keys."""
        step, (count, _, groups, _) = self.cache.step, key.shape
        self.keys_CGLD[self.cache.slots_T, :, step.positions_T] = key[:, 0]
        self.values_CGLD[self.cache.slots_T, :, step.positions_T] = value[:, 0]
        context = attention.attend_heads(
            query[:, 0].unflatten(1, (groups, -1)),
            self.keys_CGLD[:count, :, : step.longest],
            self.values_CGLD[:count, :, : step.longest],
            attn_mask=self.cache.seen(attention.window),
        )
        return context.flatten(1)[:, None]

    def _reserve(self, places: int, key: Tensor, value: Tensor) -> None:
        """Have so many places in every slot; what is kept stays."""
        if self.keys_CGLD is not None and self.keys_CGLD.size(2) >= places:
            return
        old = self.keys_CGLD, self.values_CGLD
        new = [x.new_zeros(self.cache.slots, x.size(2), places, x.size(3)) for x in (key, value)]
        if old[0] is not None:
            for before, after in zip(old, new, strict=True):
                after[:, :, : before.size(2)] = before
        self.keys_CGLD, self.values_CGLD = new


def grown(places: int, most: int) -> int:
    """The places there are when so many are needed: powers of two, so that growing costs little, and at most `most`."""
    return min(max(LEAST_PLACES, 1 << (places - 1).bit_length()), max(most, places))
