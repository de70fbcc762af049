"""Which rank is slow: seconds that each one needs by itself, before it first waits for its data-parallel peers."""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist


class OwnSeconds:
    """The time from `start` to the reduction of gradients: on the device's clock where there is one.

    Ranks of one model replica wait for each other in between, so a slow one shows in its whole replica.
    """

    def __init__(self):
        self._marks = []

    def start(self) -> None:
        self._marks = [now()]

    def before(self, reduce_gradients: Callable) -> Callable:
        """A function that stops the time and then does what `reduce_gradients` does."""

        def stop_and_reduce(*args, **kwargs):
            self._marks = [*self._marks[:1], now()]
            return reduce_gradients(*args, **kwargs)

        return stop_and_reduce

    def read(self) -> float:
        """Seconds of the last step; waits for the device to have done it."""
        start, stop = self._marks
        if isinstance(start, float):
            return stop - start
        stop.synchronize()
        return start.elapsed_time(stop) / 1000


def now():
    """A moment on the device's clock: an event on CUDA, seconds elsewhere."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def compare_ranks(seconds: float, device: torch.device) -> dict[str, float]:
    """The slowest rank and its seconds over those of the median rank; nothing for a rank alone.

    Collectives: one all-gather of 8 bytes a rank.
    """
    if dist.get_world_size() == 1:
        return {}
    all_R = torch.zeros(dist.get_world_size(), dtype=torch.float64, device=device)
    dist.all_gather_into_tensor(all_R, torch.tensor([seconds], dtype=torch.float64, device=device))
    slowest = int(all_R.argmax())
    return {"slowest_rank": slowest, "slowest_over_median": float(all_R[slowest] / all_R.median())}
