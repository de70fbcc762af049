"""What all ranks must see alike."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from megakd.errors import MegakdError

Result = TypeVar("Result")


def from_rank_0(function: Callable[[], Result]) -> Result:
    """What a function returns on rank 0, on every rank; so that all see one state of a folder that may change.

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
    dist.broadcast_object_list(result)
    if isinstance(result[0], MegakdError):
        raise result[0]
    return result[0]
