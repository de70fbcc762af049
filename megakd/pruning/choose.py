"""From importances to what is kept: pure functions."""

import dataclasses

import torch
from torch import Tensor

from megakd.config import Model, Prune
from megakd.pruning.sizes import cuts_of, named_layers, narrowed, with_layers


@dataclasses.dataclass(frozen=True)
class Kept:
    """Which parts of a model its student has, by their numbers in the model, ascending.

    Attributes:
        layers: [n].
        parts: by key of the prune section, of those sizes that get smaller; of all layers of the model, whether they
            are left or not: hidden_size [n]; num_query_groups, ffn_hidden_size, num_experts, shared_ffn_hidden_size
            [layer, n]; expert_ffn_hidden_size [layer, expert, n].
    """

    layers: list[int]
    parts: dict[str, Tensor]

    def of(self, key: str, *index: int) -> Tensor | None:
        """Of one layer (and expert); None: all."""
        return None if key not in self.parts else self.parts[key][index]

    def of_left_layers(self, key: str) -> Tensor:
        """Of the layers that are left alone."""
        ids = self.parts[key]
        return ids if ids.dim() == 1 else ids[self.layers]


def most_important(importances: Tensor, number: int) -> Tensor:
    """The places of the `number` largest along the last axis, ascending; of equal ones the first."""
    order = importances.nan_to_num(nan=-torch.inf).argsort(dim=-1, descending=True, stable=True)
    return order[..., :number].sort(dim=-1).values


def choose(model: Model, wanted: Prune, importances: dict[str, Tensor]) -> Kept:
    """What is left.

    Args:
        importances: by key of the prune section, for every size that is cut (shapes: Kept.parts).
    """
    cuts = cuts_of(model, wanted)
    layers = named_layers(model, wanted)
    if layers is None:
        layers = most_important(importances["num_layers"], cuts["num_layers"]).tolist()
    widths = {key: number for key, number in cuts.items() if key != "num_layers"}
    return Kept(layers, {key: most_important(importances[key], number) for key, number in widths.items()})


def student_of(model: Model, wanted: Prune, kept: Kept) -> Model:
    """Its model section."""
    return with_layers(narrowed(model, wanted), kept.layers)
