"""What a CPU answers where Megatron-Core asks torch.cuda."""

import collections
import contextlib
import functools
import importlib.util
import os

import torch

CPU = torch.device("cpu")
FACTORIES = (
    "empty zeros ones full tensor arange rand randn randint randperm eye linspace as_tensor "
    "empty_like zeros_like ones_like full_like rand_like randn_like"
).split()


class Event:
    """A CUDA event of a device that does everything at once."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self, stream=None):
        pass

    def wait(self, stream=None):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True

    def elapsed_time(self, other):
        return 0.0


class Stream:
    """A CUDA stream of a device that does everything at once."""

    cuda_stream = 0
    device = CPU

    def __init__(self, *args, **kwargs):
        pass

    def record_event(self, event=None):
        return event or Event()

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def synchronize(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return False


def pose_as_cuda() -> None:
    """Answer for CUDA from now on, before Megatron is imported. Safe to call again."""
    if torch.cuda.Stream is Stream:
        return
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # on a machine with GPUs, a run on the CPU leaves them alone
    if importlib.util.find_spec("transformers"):
        import transformers  # noqa: F401  reads torch.cuda while it is imported, so it must come before the patches
    _patch_factories()
    _patch_tensors()
    _patch_cuda()


def seed_as_cuda() -> None:
    """Megatron's own random states are the CPU's too; once Megatron is imported."""
    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


def _is_cuda(device) -> bool:
    return (isinstance(device, int) and not isinstance(device, bool)) or str(device).startswith("cuda")


def _to_cpu(device):
    return CPU if device is not None and _is_cuda(device) else device


def _patch_factories() -> None:
    def on_cpu(factory):
        @functools.wraps(factory)
        def build(*args, **kwargs):
            if "device" in kwargs:
                kwargs["device"] = _to_cpu(kwargs["device"])
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            return factory(*args, **kwargs)

        return build

    for name in FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))

    class Generator(torch.Generator):
        def __new__(cls, device="cpu"):
            return super().__new__(cls, device=_to_cpu(device))

    torch.Generator = Generator


def _patch_tensors() -> None:
    tensor_to, tensor_type = torch.Tensor.to, torch.Tensor.type

    def to(self, *args, **kwargs):
        if args and isinstance(args[0], (str, torch.device)):
            args = (_to_cpu(args[0]), *args[1:])
        if "device" in kwargs:
            kwargs["device"] = _to_cpu(kwargs["device"])
        return tensor_to(self, *args, **kwargs)

    def type_(self, *args, **kwargs):
        name = tensor_type(self, *args, **kwargs)
        # Megatron's optimizers look for "torch.cuda.FloatTensor" and its like.
        return name if args or kwargs else name.replace("torch.", "torch.cuda.")

    torch.Tensor.to, torch.Tensor.type = to, type_
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    torch.Tensor.record_stream = lambda self, stream: None


def _patch_cuda() -> None:
    cuda = torch.cuda

    def always(value):  # a new function for every name: torch._dynamo refuses one function under two names
        return lambda *args, **kwargs: value

    for name in "set_device synchronize empty_cache reset_peak_memory_stats".split():
        setattr(cuda, name, always(None))
    for name in "memory_allocated max_memory_allocated memory_reserved".split():
        setattr(cuda, name, always(0))
    cuda.current_device, cuda.device_count = always(CPU), always(1)
    cuda.memory_stats = lambda *args, **kwargs: collections.defaultdict(int)
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
        module.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))  # torch.manual_seed would come back
    cuda.default_generators = [torch.default_generator]
    cuda.Stream, cuda.Event = Stream, Event
    cuda.current_stream, cuda.default_stream = always(Stream()), always(Stream())
    cuda.stream = lambda stream: contextlib.nullcontext()
    marks = ("rangePushA", "rangePop", "rangeStartA", "rangeEnd", "markA")
    cuda.nvtx._nvtx = type("Marks", (), {name: staticmethod(always(0)) for name in marks})
