"""What a piece of code costs: seconds of its phases, peak bytes of tensors, bytes it hands to collectives.

All of it for the ranks of the default process group together, on CPU or CUDA.
"""

import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

# Where the tensors that a rank gives away stand among the arguments of torch's collectives.
GIVEN = {
    "allreduce_": 0,
    "allgather_": 1,
    "_allgather_base_": 1,
    "allgather_into_tensor_coalesced_": 1,
    "reduce_scatter_": 1,
    "_reduce_scatter_base_": 1,
    "alltoall_": 1,
    "alltoall_base_": 1,
    "scatter_": 1,
    "gather_": 1,
    "broadcast_": 0,
    "barrier": None,
}


class Collectives(TorchDispatchMode):
    """Counts the bytes this rank hands to collectives while the mode is on, autograd's own included.

    A payload is counted once, whatever an algorithm makes of it: an all-gather sends it to every other rank, a ring
    all-reduce moves it 2 (R - 1) / R times.
    """

    def __init__(self):
        super().__init__()
        self.given_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            if name not in GIVEN:
                raise NotImplementedError(f"the benchmark does not know the collective {name}")
            if GIVEN[name] is not None:
                self.given_bytes += _bytes(args[GIVEN[name]])
        return func(*args, **(kwargs or {}))


def _bytes(tensors) -> int:
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_bytes, tensors))


def given_bytes(phase: Callable[[], object]) -> tuple[object, int]:
    """What the phase returns, and the bytes this rank handed to collectives in it."""
    with Collectives() as collectives:
        result = phase()
    return result, collectives.given_bytes


def peak_extra_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensors alive at once during the run, beyond those alive before it, temporaries of torch included.

    On CPU every allocation and release that torch's allocator reports is added up in order, so the figure is exact and
    repeatable; buffers inside gloo are not torch's and not in it. On CUDA it is the allocator's own peak.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = run()
        torch.cuda.synchronize(device)
        del kept
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = run()
    del kept
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def phase_seconds(phases: Sequence[Callable[[object], object]], device: torch.device) -> tuple[list[float], float]:
    """Seconds of each phase, and the CPU seconds of this process in all of them. All ranks start together.

    A phase gets what the one before returned. On a busy machine the CPU seconds are the steadier measure of work on a
    CPU: time in which the process did not run, or waited for other ranks, is not in them.
    """
    if dist.get_world_size() > 1:
        dist.barrier()
    result, marks, cpu = None, [_now(device)], time.process_time()
    for phase in phases:
        result = phase(result)
        marks.append(_now(device))
    return [after - before for before, after in pairwise(marks)], time.process_time() - cpu


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def slowest(repeats: list[tuple[list[float], float]]) -> tuple[list[list[float]], list[float]]:
    """For each repeat, the phases of the rank that took longest, and the CPU seconds of the busiest. Collective."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, repeats)
    rounds = list(zip(*everyone, strict=True))
    seconds = [max((phases for phases, _ in ranks), key=sum) for ranks in rounds]
    return seconds, [max(cpu for _, cpu in ranks) for ranks in rounds]


def copy_bandwidth(device: torch.device, nbytes: int, repeats: int = 7) -> float:
    """Most bytes per second, read and written, of copying a buffer while every rank copies its own. Collective."""
    source = torch.ones(nbytes // 2, dtype=torch.bfloat16, device=device)
    target = torch.zeros_like(source)
    seconds = [phase_seconds([lambda _: target.copy_(source)], device) for _ in range(repeats)]
    return 2 * _bytes(source) / min(each for [each] in slowest(seconds)[0])
