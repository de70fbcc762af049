"""What all ranks must see alike."""

import datetime
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch.distributed as dist

from megakd.errors import ConfigError, MegakdError
from megakd.ranks.launch import Launch

Result = TypeVar("Result")
MOST_LINES = 20


def from_rank_0(function: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result:
    """What a function returns on rank 0, on every rank; so that all see one state of a folder that may change.

    Args:
        group: of all ranks, whose time limit is to count for the wait; None: the default one.
    Raises:
        MegakdError: that of rank 0, on every rank.
    Collectives: one broadcast of the pickled result.
    """
    result = [None]
    if dist.get_rank() == 0:
        try:
            result = [function()]
        except MegakdError as error:
            result = [error]
    dist.broadcast_object_list(result, group=group)
    if isinstance(result[0], MegakdError):
        raise result[0]
    return result[0]


def check_facts(launch: Launch, store: dist.Store, facts: Mapping[str, object], seconds: float) -> None:
    """Compare what ranks know of the run before they build anything; through the store, for groups may not even form.

    Args:
        facts: plain values by key: the resolved config, versions, environment.
        seconds: how long ranks wait for each other.
    Raises:
        ConfigError: on every rank; names each key that differs, and on which ranks it has which value.
    """
    own = json.dumps(facts, sort_keys=True, default=str)
    store.set(f"facts/{launch.rank}", own)
    store.set(f"digest/{launch.rank}", hashlib.sha256(own.encode()).hexdigest())
    if launch.rank == 0:
        ranks = range(launch.world_size)
        store.wait([f"digest/{rank}" for rank in ranks], datetime.timedelta(seconds=seconds))
        digests = store.multi_get([f"digest/{rank}" for rank in ranks])
        texts = {digest: store.get(f"facts/{rank}") for rank, digest in zip(ranks, digests, strict=True)}
        known = {digest: json.loads(text) for digest, text in texts.items()}
        store.set("differences", json.dumps(differences([known[digest] for digest in digests])))
    store.wait(["differences"], datetime.timedelta(seconds=seconds))
    lines = json.loads(store.get("differences"))
    if lines:
        more = [f"and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else []
        raise ConfigError(
            "the ranks were not started alike: " + "\n  ".join((*lines[:MOST_LINES], *more)),
            hint="start every rank with the same command, files, installation and environment",
        )


def differences(facts: list[dict]) -> list[str]:
    """A line for each key that is not the same on all ranks: `optimizer.lr: 0.01 on ranks 0-2, 0.02 on rank 3`.

    Args:
        facts: of each rank, in their order.
    """
    lines = []
    for key in sorted(set().union(*facts)):
        where: dict[str, list[int]] = {}
        for rank, known in enumerate(facts):
            where.setdefault(str(known[key]) if key in known else "missing", []).append(rank)
        if len(where) > 1:
            lines.append(f"{key}: " + ", ".join(f"{value} on {name_ranks(ranks)}" for value, ranks in where.items()))
    return lines


def name_ranks(ranks: list[int]) -> str:
    """`rank 3`, or `ranks 0-2, 5` of numbers in ascending order."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
