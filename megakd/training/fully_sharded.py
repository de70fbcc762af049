"""The student under FSDP, in place of Megatron's data-parallel wrapper, and its optimizer's state in checkpoints."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from torch import Tensor

from megakd.checkpoints import torch_dist
from megakd.checkpoints.folder import Checkpoint
from megakd.checkpoints.loading import fail_together
from megakd.checkpoints.pieces import describe_whole, pieces
from megakd.errors import CheckpointError
from megakd.models.gpt import GPT
from megakd.models.sharding import own, shard
from megakd.training.optimizer_state import GROUP_KEYS, different_weight, kind_of

BY_PARAMETER = (torch.optim.Adam, torch.optim.AdamW)  # count steps so; those of Transformer Engine and Apex by group
SHARDING_TYPE = "fully_reshardable"  # the name that Megatron's distributed optimizer gives to states by parameter


class FullySharded(_BaseDataParallel):
    """What Megatron's schedules and optimizers ask of a data-parallel wrapper, for a student that FSDP shards.

    Its parameters are this rank's rows, as plain tensors: so that Megatron's sums over tp, clipping and any Adam work
    on them. FSDP reduces gradients with every micro-batch.

    Args:
        gpt: this rank's part; sharded here.
    Attributes:
        wholes: the model's parameters by name, as FSDP keeps them.
        parts: their rows by name, in the model's order; some ranks may have none of a small one.
    """

    def __init__(self, gpt: GPT, groups):
        super().__init__(config=gpt.config, module=self.sharded(gpt, groups))
        self.ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=False)
        self.group = groups.dp_cp
        self.wholes = dict(gpt.named_parameters())
        self.parts = {name: part_of(whole, self.noted(name)) for name, whole in self.wholes.items()}

    def sharded(self, gpt: GPT, groups) -> GPT:
        return shard(gpt, groups.dp_cp, trained=True)

    def noted(self, name: str) -> dict:
        """What Megatron has noted on a parameter: how it is cut over tp, what is summed."""
        return vars(self.wholes[name])

    def named_parameters(self, *args, **kwargs) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return ((f"module.{name}", part) for name, part in self.parts.items() if part.numel())

    def parameters(self, *args, **kwargs) -> Iterator[torch.nn.Parameter]:
        return (part for _, part in self.named_parameters())

    def zero_grad_buffer(self) -> None:
        for whole in self.wholes.values():
            whole.grad = None

    def finish_grad_sync(self, force_all_reduce: bool = False) -> None:
        """Give the parts their gradients. FSDP has made means of them, the loss counts on sums."""
        for name, part in self.parts.items():
            whole = self.wholes[name]
            part.data = own(whole.detach())  # FSDP may put it elsewhere before it first runs
            part.main_grad = own(whole.grad)
            part.main_grad.mul_(self.group.size())

    def scale_gradients(self, scaling_factor) -> None:
        for part in self.parts.values():
            part.main_grad.mul_(scaling_factor)


def part_of(parameter: torch.nn.Parameter, noted: dict) -> torch.nn.Parameter:
    """This rank's rows of a sharded parameter, with what Megatron has noted on it."""
    part = torch.nn.Parameter(own(parameter.detach()))
    vars(part).update(noted)
    return part


def describe_state(student: FullySharded, optimizer, groups, *, loading: bool) -> dict:
    """An optimizer's sharded state, under the names that Megatron's distributed optimizer writes and reads.

    Args:
        optimizer: Megatron's, of the student.
        loading: main weights are read beside the model's, to be compared.
    """
    inner = adam(optimizer)
    step = max(steps_of(inner), default=0)
    param_groups = [{key: value for key, value in group.items() if key != "params"} for group in inner.param_groups]
    described = {}
    for name, (base, whole) in bases(student, groups).items():
        main = student.parts[name].detach()
        tensors = {"param": torch.empty_like(main) if loading else main} | moments(inner, student.parts[name])
        for kind, local in tensors.items():
            described |= pieces(f"{name}.{kind}", base, whole, local, key=f"optimizer.state.{kind}.{base.key}")
    return {
        "optimizer": {"param_groups": [group | {"step": step} for group in param_groups]},
        "param_state": described,
        "param_state_sharding_type": SHARDING_TYPE,
    }


def take_state(student: FullySharded, optimizer, groups, described: dict, loaded: dict, checkpoint: Checkpoint) -> None:
    """Give an optimizer its state; the model's weights are loaded already.

    Args:
        described: what `describe_state` gave for loading.
        loaded: the same, read.
    Raises:
        CheckpointError: on every rank; its main weights are not the model's.
    Collectives: one all-gather of a short text.
    """
    inner, read = adam(optimizer), loaded["param_state"]
    kind, failure = student.config.params_dtype, None
    for name, (base, whole) in bases(student, groups).items():
        for number, weight in pieces(f"{name}.param", base, whole, student.parts[name].detach()).items():
            main = read[number].to(weight.data.device)
            failure = failure or different_weight(weight.data.to(kind), main, checkpoint)
            weight.data.copy_(main)
    for name, moment in described["param_state"].items():
        if ".param." not in name:
            moment.data.copy_(read[name])
    fail_together(failure)
    for group in inner.param_groups:
        known = [one for one in loaded["optimizer"]["param_groups"] if kind_of(one) == kind_of(group)]
        if not known:
            raise CheckpointError(
                f"{checkpoint.path} holds no group of parameters with { {key: group.get(key) for key in GROUP_KEYS} }",
                hint="another version of Megatron-Core may have saved it; student.checkpoint takes its weights alone",
            )
        saved = known[0]
        group.update({key: value for key, value in saved.items() if key not in ("params", "step")})
        if isinstance(inner, BY_PARAMETER):
            for part in group["params"]:
                inner.state[part]["step"] = torch.tensor(float(saved["step"]))
        else:
            group["step"] = int(saved["step"])


def bases(student: FullySharded, groups) -> dict[str, tuple[object, torch.nn.Parameter]]:
    """Megatron's description of every parameter, as if it were whole, and the parameter."""
    weights, sharded = describe_whole(student.module, torch_dist.sharding_metadata(groups))
    by_whole = {id(whole): weights[name] for name, whole in sharded.items()}
    return {name: (by_whole[id(whole)], whole) for name, whole in student.wholes.items()}


def adam(optimizer) -> torch.optim.Optimizer:
    """The optimizer inside of Megatron's; there is one, as no expert is divided over ranks."""
    (one,) = getattr(optimizer, "chained_optimizers", [optimizer])
    return one.optimizer


def moments(inner: torch.optim.Optimizer, part: torch.nn.Parameter) -> dict[str, Tensor]:
    """Of one part; zeros where no step has been taken."""
    if not part.numel():
        return {}
    state = inner.state[part]
    if not state:
        state |= {"exp_avg": torch.zeros_like(part.detach()), "exp_avg_sq": torch.zeros_like(part.detach())}
        if isinstance(inner, BY_PARAMETER):
            state["step"] = torch.tensor(0.0)
    return {kind: state[kind] for kind in ("exp_avg", "exp_avg_sq")}


def steps_of(inner: torch.optim.Optimizer) -> list[int]:
    """How many steps have been taken, as each parameter or group counts them."""
    counts = [int(state["step"]) for state in inner.state.values() if "step" in state]
    return counts + [int(group["step"]) for group in inner.param_groups if "step" in group]


@torch.no_grad()
def sharded_squares(student: FullySharded) -> dict[str, float]:
    """The sum of squares of the gradient of every parameter of this rank's model by name, over all of its rows.

    Collectives: one all-reduce of 8 bytes a parameter over the ranks that share it.
    """
    squares = [
        torch.linalg.vector_norm(part.main_grad, dtype=torch.float64).square() for part in student.parts.values()
    ]
    squares_P = torch.stack(squares)
    dist.all_reduce(squares_P, group=student.group)
    return dict(zip(student.parts, squares_P.tolist(), strict=True))
