"""Two-way rules between Megatron's tensors and another format's; a list of them is a family's whole mapping.

Megatron's names are those of Transformer Engine layers on one rank, `decoder.layers.7.mlp.linear_fc1.weight`, experts
as `decoder.layers.7.mlp.experts.3.linear_fc1.weight`. Rules do not compute on values, so that there and back is the
same to the bit (`plus_one` does, for exports that could not be made otherwise); they work on meta tensors as well,
which is how shapes are known before weights are read.

Legend: N query heads, G query groups, D channels of a head, F inner width of the feed-forward block.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Some tensors of ours that are made of some of theirs, and back.

    Attributes:
        ours, theirs: names, in the order in which the functions take and return them.
        to_ours, to_theirs: inverse of each other.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    to_ours: Callable[[Tensors], Tensors]
    to_theirs: Callable[[Tensors], Tensors]


def copy(ours: str, theirs: str) -> Rule:
    return Rule((ours,), (theirs,), lambda t: t, lambda t: t)


def plus_one(ours: str, theirs: str) -> Rule:
    """Ours is a gain - 1, theirs the gain; theirs is float32 whatever ours is, since 1 + small needs the digits."""
    return Rule((ours,), (theirs,), lambda t: (t[0].float() - 1,), lambda t: (t[0].float() + 1,))


def transposed(rule: Rule) -> Rule:
    """The rule for a format that stores every matrix [in, out] instead of [out, in]."""

    def flip(tensors: Iterable[Tensor]) -> Tensors:
        return tuple(t.t().contiguous() if t.dim() == 2 else t for t in tensors)

    return dataclasses.replace(
        rule, to_ours=lambda t: rule.to_ours(flip(t)), to_theirs=lambda t: flip(rule.to_theirs(t))
    )


def stack(ours: str, *theirs: str) -> Rule:
    """Ours is theirs, all of one size, one after the other: the gate and up halves of a gated block's first layer."""
    return Rule(
        (ours,),
        theirs,
        lambda t: (torch.cat(t),),
        lambda t: tuple(part.contiguous() for part in t[0].chunk(len(theirs))),
    )


def split_rows(ours: str, rest: str, theirs: str, rows: int) -> Rule:
    """Their first `rows` rows are not ours; they are kept under the name `rest`."""
    return Rule(
        (ours, rest),
        (theirs,),
        lambda t: (t[0][rows:].contiguous(), t[0][:rows].contiguous()),
        lambda t: (torch.cat([t[1], t[0]]),),
    )


def qkv(ours: str, theirs: tuple[str, str, str], heads: int, groups: int, channels: int) -> Rule:
    """Theirs are q [N * D, ...], k and v [G * D, ...]; ours has, by group, its N / G queries, its key, its value."""
    sizes = [heads // groups * channels, channels, channels]

    def to_ours(tensors: Tensors) -> Tensors:
        parts = [t.reshape(groups, size, *t.shape[1:]) for t, size in zip(tensors, sizes, strict=True)]
        return (torch.cat(parts, 1).flatten(0, 1),)

    def to_theirs(tensors: Tensors) -> Tensors:
        (fused,) = tensors
        parts = fused.reshape(groups, sum(sizes), *fused.shape[1:]).split(sizes, 1)
        return tuple(part.flatten(0, 1).contiguous() for part in parts)

    return Rule((ours,), theirs, to_ours, to_theirs)


def packed_qkv(ours: str, theirs: str, heads: int, groups: int, channels: int) -> Rule:
    """Theirs is one tensor, all queries, then all keys, then all values; ours as in `qkv`."""
    inner = qkv(ours, ("q", "k", "v"), heads, groups, channels)
    sizes = [heads * channels, groups * channels, groups * channels]
    return Rule(
        (ours,), (theirs,), lambda t: inner.to_ours(t[0].split(sizes)), lambda t: (torch.cat(inner.to_theirs(t)),)
    )


def by_their_name(rules: Iterable[Rule]) -> dict[str, Rule]:
    """Rules by each of their names.

    Raises:
        AssertionError: two rules speak of one tensor, on either side: the table is wrong.
    """
    rules = list(rules)
    for side in ("ours", "theirs"):
        names = [name for rule in rules for name in getattr(rule, side)]
        assert len(set(names)) == len(names), f"{side}: named twice: {sorted({n for n in names if names.count(n) > 1})}"
    return {name: rule for rule in rules for name in rule.theirs}


def their_shapes(rule: Rule, ours: dict[str, tuple[torch.Size, torch.dtype]]) -> Iterator[tuple[str, Tensor]]:
    """Their names with meta tensors of the shapes and types that they would have."""
    made = rule.to_theirs(tuple(torch.empty(s, dtype=d, device="meta") for s, d in (ours[n] for n in rule.ours)))
    yield from zip(rule.theirs, made, strict=True)
