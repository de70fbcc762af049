"""The student under Megatron-FSDP, in place of torch's: flat buffers of whole rows, gathered and reduced by bucket.

What Megatron's trainers take for granted, and megakd does not do, is brought about here:
- A backward pass begins at the output of the model's forward. Here the head runs after it, and its gradient is there
  before that of the hidden states: Megatron-FSDP would begin a pass that is half over, and zero the head's gradient. So
  the loss passes through a module of which Megatron-FSDP takes the output for the model's.
- The module that is wrapped is called by another (Float16Module). Without one its hooks never run: the queue of
  reductions is then not emptied between micro-batches, and from the second on every parameter reduces its whole bucket
  anew (0.16.1; no error, gradients several times too large).
- The head's own forward gathers its weight. Here all that is not in a layer is gathered before the model's forward.
- Megatron's wrapper gives all tensor-parallel ranks the random states of the first, so that dropout draws one mask for
  different heads. Here it does not.
- Megatron's optimizer takes the parameters, and puts the new weights in their place. Here the optimizer has this rank's
  rows as plain tensors, as with torch's FSDP; what they are is put in place before the next forward.
"""

import contextlib
import functools
import logging

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from torch import Tensor, nn

from megakd.errors import ConfigError
from megakd.models.gpt import GPT
from megakd.models.sharding import end_gathers
from megakd.training.fully_sharded import FullySharded

# What grad_reduce_in_fp32 says in 0.16 is these since.
TYPES = "megatron_fsdp_main_params_dtype megatron_fsdp_main_grads_dtype megatron_fsdp_grad_comm_dtype".split()


class FullyShardedByMegatron(FullySharded):
    """As its base; gradients are sums, in float32, and are reduced with every micro-batch.

    Weights are kept twice: float32 rows for the optimizer, and rows in the type that the model computes in, from which
    a bucket is gathered.

    Attributes:
        engine: Megatron's wrapper.
    """

    def sharded(self, gpt: GPT, groups) -> GPT:
        attributes = {name: dict(vars(parameter)) for name, parameter in gpt.named_parameters()}
        root = Root(gpt)
        engine = build_engine(root, groups)
        vars(self).update(attributes=attributes, engine=engine, through=root.through)  # no modules of this: gpt is one
        vars(gpt)["sharded_by"] = engine.module
        gpt.register_forward_pre_hook(self.make_ready, prepend=True)
        return gpt

    def noted(self, name: str) -> dict:
        return self.attributes[name]

    def make_ready(self, gpt: GPT, inputs) -> None:
        """Before a forward: the weights of the last update, and whole what does not belong to a layer."""
        engine = self.engine.module
        if engine.is_param_fsdp_distributed:
            engine.install_optimized_model_weights()
            engine._replace_param_with_raw_if_needed()
        within = {id(parameter) for layer in gpt.decoder.layers for parameter in layer.parameters()}
        outside = [parameter for parameter in gpt.parameters() if id(parameter) not in within]
        engine.all_gather_and_wait_parameters_ready(outside, prefetch=False)

    def announced(self, loss_function):
        """A loss function of Megatron's schedules whose backward Megatron-FSDP knows of."""

        def announce(hidden_SBH: Tensor):
            loss, *rest = loss_function(hidden_SBH)
            return self.through(loss), *rest

        return announce

    def zero_grad_buffer(self) -> None:
        self.engine.zero_grad_buffer()

    def finish_grad_sync(self, force_all_reduce: bool = False) -> None:
        """Give the parts their gradients."""
        end_gathers(self.engine.module)
        self.engine.finish_grad_sync()
        for name, part in self.parts.items():
            gradient = self.wholes[name].grad  # None where this rank has no row
            part.main_grad = torch.zeros_like(part) if gradient is None else gradient.to_local()


class Through(nn.Module):
    """Holds a model, hands on what it is given; to Megatron-FSDP, as all parameters are in it, the model."""

    def __init__(self, gpt: GPT):
        super().__init__()
        self.gpt = gpt

    def forward(self, given: Tensor) -> Tensor:
        return given


class Root(nn.Module):
    def __init__(self, gpt: GPT):
        super().__init__()
        self.through = Through(gpt)


def build_engine(root: Root, groups):
    """Megatron's wrapper around the student: weights, gradients and optimizer state in parts."""
    try:
        import einops  # noqa: F401  of which the adapter finds out too late
    except ImportError:
        raise ConfigError(
            "parallel.fsdp_by: megatron, but Megatron-FSDP needs einops, which is not installed",
            hint='pip install "megakd[fsdp]"; or parallel.fsdp_by=torch',
        ) from None
    from megatron.core.distributed.fsdp import mcore_fsdp_adapter

    if not isinstance(getattr(mcore_fsdp_adapter, "TELinear", nn.Linear), type):  # 0.16 without Transformer Engine
        mcore_fsdp_adapter.TELinear = type("TELinear", (nn.Module,), {})

    class Engine(mcore_fsdp_adapter.FullyShardedDataParallel):
        def sync_rng_states_across_tp_group(self) -> None:
            """They differ on purpose."""

    gpt = root.through.gpt
    device = next(gpt.parameters()).device
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        use_megatron_fsdp=True,
        data_parallel_sharding_strategy="optim_grads_params",
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
        average_in_collective=False,
    )
    for name in TYPES:
        if hasattr(ddp_config, name):
            setattr(ddp_config, name, torch.float32)
    with numbered_device() if device.type == "cpu" else contextlib.nullcontext():
        engine = Engine(gpt.config, ddp_config, root, device=device, pg_collection=groups)
    if device.type == "cpu":  # gloo's threads write where a stream would wait
        pipeline = engine.module.all_gather_pipeline
        pipeline.all_gather_params = functools.partial(pipeline.all_gather_params, async_param_gather=False)
    return engine


@contextlib.contextmanager
def numbered_device():
    """Megatron-FSDP makes a device of the current one's number, and says that the given one is another."""
    log = logging.getLogger("megatron.core.distributed.fsdp.src.megatron_fsdp.megatron_fsdp")
    current, torch.cuda.current_device = torch.cuda.current_device, lambda: 0
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        torch.cuda.current_device = current
        log.setLevel(level)
