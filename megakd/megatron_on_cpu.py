"""The device seam: the unmodified megatron-core runs on CPU and gloo, and four upstream bugs are mended.

Megatron-Core asks torch.cuda for its device, random state, streams and tensor types. On `cpu` this module answers those
questions with the CPU, by plain patches made before Megatron is imported (no mode, no cost per operation). On `cuda`
nothing is patched. Every other module may import Megatron only after `install(device)` has run.

What is mended, beside the device (each has a test that fails without it):
    1. distributed optimizer, torch Adam: loading a checkpoint looks up a key 'step' that is never saved.
    2. distributed optimizer, torch Adam: after a load all parameters share one step counter, which one step() then
       advances once per parameter.
    3. distributed optimizer, torch Adam: an optimizer that has never stepped, or has no parameter (that of experts on a
       pipeline stage without any), cannot describe its state.
These three occur on CUDA too when neither Transformer Engine nor Apex is installed, and never with them.
    4. distributed optimizer, any Adam: in a checkpoint that can be resharded, master weights and moments of all but the
       first bucket of gradients are cut out as many elements too late as buckets before were padded, and zeros take
       the place of the last. Buckets are padded to a multiple of 128 and of the data-parallel size: a run of 24 ranks
       that overlaps its reductions went on from shifted weights. Upstream warns ("can lead to data corruption").
0.16.1, 0.17.1, 0.18.2 and 0.19.2 have all four. Where one of the first three is gone its mend changes nothing: it fills
in what is missing and copies what might be shared; the fourth looks whether its bug is there. What is mended of single
layers is in megakd.models.moe.
"""

import collections
import contextlib
import functools
import importlib.util
import inspect
import logging
import os
import re
import warnings

import torch

LOG = logging.getLogger("megakd")
CPU = torch.device("cpu")
FACTORIES = (
    "empty zeros ones full tensor arange rand randn randint randperm eye linspace as_tensor "
    "empty_like zeros_like ones_like full_like rand_like randn_like"
).split()


TESTED = ("0.16.1", "0.19.2")  # the oldest and the newest Megatron-Core that the tests have run on; see pyproject.toml
ADVICE = (  # for those who write on Megatron, of 0.19; megakd's users can do nothing with it
    "GPTModel IS DEPRECATED",
    "DistributedDataParallel: full_param_layout not provided",
)


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


def install(device: str) -> None:
    """Make megatron-core importable and usable on `device`; call before anything imports it. Safe to call again.

    Args:
        device: "cpu" or "cuda" (resolved: never "auto").
    """
    if device == "cpu" and torch.cuda.Stream is not Stream:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # on a machine with GPUs, a run on the CPU leaves them alone
        if importlib.util.find_spec("transformers"):
            import transformers  # noqa: F401  reads torch.cuda while it is imported, so it must come before the patches
        _patch_factories()
        _patch_tensors()
        _patch_cuda()
    with _fusions_left_alone() if device == "cpu" else contextlib.nullcontext():
        _import_quietly()
    if device == "cpu":
        import megatron.core.tensor_parallel.random as megatron_random

        megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    mend_distributed_optimizer()
    mend_buckets()


@contextlib.contextmanager
def _fusions_left_alone():
    """Megatron's fusions stay as they are written: compiled, they cost minutes of C++ and gain nothing on a CPU.

    Even switched off by TORCH_COMPILE_DISABLE, the decorator imports the compiler: 3.5 of 9 seconds of a rank's start.
    Megatron takes torch.compile when it is first imported, and keeps it for the modules that come later.
    """
    compile_, torch.compile = torch.compile, lambda function=None, **options: function or (lambda late: late)
    try:
        yield
    finally:
        torch.compile = compile_


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


def _import_quietly() -> None:
    """Import Megatron with its eight warnings about absent packages replaced by one line that says what follows."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"megatron\.")
        warnings.filterwarnings("ignore", message=r"(Transformer Engine and Apex are|Apex is) not installed")
        import megatron.core.models.gpt.gpt_layer_specs  # it warns too, and every model needs it
        import megatron.core.optimizer.distrib_optimizer as distrib_optimizer
    # While it runs, Megatron uses old names of torch and looks at .grad of views: not the doing of the user.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch\.distributed|megatron)\.")
    warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
    for name in ("models.gpt.gpt_model", "distributed.distributed_data_parallel"):
        logging.getLogger(f"megatron.core.{name}").addFilter(is_for_users)
    warn_of_version(megatron.core.__version__)
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        LOG.info("neither Transformer Engine nor Apex is installed: torch's own Adam, norms and attention are used")


def is_for_users(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(ADVICE)


def was_tested(version: str) -> bool:
    """Whether a Megatron-Core is of a minor version within TESTED."""
    oldest, newest, here = ([int(part) for part in re.findall(r"\d+", text)[:2]] for text in (*TESTED, version))
    return oldest <= here <= newest


def warn_of_version(version: str) -> None:
    """One line for a Megatron-Core that nobody has tried megakd with."""
    if not was_tested(version):
        LOG.warning(
            "megatron-core %s: megakd was tested with %s to %s; docs/is-my-run-right.md says what to look at",
            version, *TESTED,
        )  # fmt: skip


def mend_distributed_optimizer() -> None:
    """Mend bugs 1 to 3 of the module docstring; nothing with Transformer Engine or Apex, whose Adam has no step."""
    from megatron.core.optimizer import distrib_optimizer

    cls = distrib_optimizer.DistributedOptimizer
    if distrib_optimizer.HAVE_APEX_OR_TE or hasattr(cls, "megakd_upstream"):
        return
    upstream = (cls._set_main_param_and_optimizer_states, cls.load_state_dict, cls.sharded_state_dict)
    set_states, load_state_dict, sharded_state_dict = cls.megakd_upstream = upstream
    state_dict = cls.state_dict

    def set_states_with_step(self, model_param, tensors):
        group, order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group]["params"][order]
        with torch.no_grad():
            set_states(self, model_param, {**tensors, "step": self.optimizer.state[main_param]["step"]})

    def load_with_own_steps(self, state_dict):
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    def describe_even_when_fresh(self, model_sharded_state_dict, is_loading=False, **kwargs):
        if is_loading and not self.optimizer.state:
            self.init_state_fn(self.optimizer, self.config)
            for state in self.optimizer.state.values():
                state.setdefault("step", torch.tensor(0.0))
        return sharded_state_dict(self, model_sharded_state_dict, is_loading=is_loading, **kwargs)

    def describe_even_when_empty(self):
        if any(group["params"] for group in self.optimizer.param_groups):
            return state_dict(self)
        groups = [
            {key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups
        ]
        return {"optimizer": {"param_groups": [group | {"step": 0} for group in groups]}}

    cls.state_dict = describe_even_when_empty
    cls._set_main_param_and_optimizer_states = set_states_with_step
    cls.load_state_dict = load_with_own_steps
    cls.sharded_state_dict = describe_even_when_fresh


def mend_buckets() -> None:
    """Mend bug 4 of the module docstring, as long as upstream has its workaround for it."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    upstream = DistributedOptimizer.sharded_param_state_fully_reshardable
    if hasattr(upstream, "megakd_upstream") or "padded with zeros" not in inspect.getsource(upstream):
        return

    def describe_where_they_are(self, *args, **kwargs):
        places = [buffer.param_index_map for buffer in self.buffers]
        try:
            for buffer in self.buffers:
                buffer.param_index_map = places_without_padding(buffer)
            return upstream(self, *args, **kwargs)
        finally:
            for buffer, place in zip(self.buffers, places, strict=True):
                buffer.param_index_map = place

    describe_where_they_are.megakd_upstream = upstream
    DistributedOptimizer.sharded_param_state_fully_reshardable = describe_where_they_are


def places_without_padding(buffer) -> dict:
    """Where a buffer's parameters are once the padding at the ends of its buckets is taken out: {parameter: (start,
    stop, bucket)}, as Megatron gathers them."""
    shifts, place = [], 0
    for bucket in buffer.buckets:
        shifts.append(place - bucket.offset)
        place += bucket.numel_unpadded
    return {
        parameter: (start + shifts[number], stop + shifts[number], number)
        for parameter, (start, stop, number) in buffer.param_index_map.items()
    }
