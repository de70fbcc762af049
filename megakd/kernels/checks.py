"""Checks of what tensors hold: at once on a CPU, and where a device computes, on the device, which nobody waits for."""

import os
from collections.abc import Callable

import torch
from torch import Tensor


def expect(fine_T: Tensor, message: str, explain: Callable[[], None]) -> None:
    """Where a row is not fine, calls `explain`, which raises with the row and what it holds.

    On a device there is no answer to wait for (and a CUDA graph can be captured): the device stops, printing `message`,
    and the next call that needs it fails. With CUDA_LAUNCH_BLOCKING=1, which waits for everything, it is as on a CPU.

    Args:
        fine_T: bool, of any shape; the same on all ranks that are to fail together.
        message: without numbers, for it is written before they are known; CUDA keeps 255 characters.
    """
    if fine_T.device.type == "cpu" or os.environ.get("CUDA_LAUNCH_BLOCKING") == "1":
        if not fine_T.all():
            explain()
    else:
        torch._assert_async(fine_T.all(), f"megakd: {message}; hint: CUDA_LAUNCH_BLOCKING=1 names the row")
