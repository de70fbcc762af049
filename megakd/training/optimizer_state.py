"""An optimizer's state for other hyperparameters, and for another number of optimizers.

Moments and main weights are saved by the names of parameters, so they find their place anyway. What is saved beside
them, for each optimizer, are the groups of parameters with their hyperparameters and the count of steps: of these a run
goes by its own hyperparameters, which `run.allow_change` may have changed. Megatron has one optimizer more for experts
that are divided over ranks.
"""

import torch
from torch import Tensor

from megakd.checkpoints.folder import Checkpoint
from megakd.checkpoints.loading import fail_together
from megakd.errors import CheckpointError

GROUP_KEYS = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")  # of which Megatron makes the groups


def fit_optimizer_state(loaded: dict, described: dict, saved: dict, checkpoint: Checkpoint) -> dict:
    """What the optimizer is given.

    Args:
        loaded: its state as read: what `described` names, and plain values as they were saved.
        described: its own sharded state.
        saved: the plain values of the saved one.
        checkpoint: for messages.
    Raises:
        CheckpointError: the state cannot be rearranged.
    """
    ours, theirs = parts_of(described), parts_of(saved)
    if len(ours) == len(theirs):
        for state, own in side_by_side(loaded, described):
            keep_own_settings(state, own)
        return loaded
    if not all("param_state" in part for part in ours) or not all("optimizer" in part for part in theirs):
        raise CheckpointError(
            f"{checkpoint.path} was saved with {len(theirs)} optimizer(s), this layout has {len(ours)}: experts "
            "that are divided over ranks have one of their own; and its state is not by parameter",
            hint="keep parallel.ep as it was, or save and continue with optimizer.distributed=true",
        )
    arranged = []  # one without parameters on this rank has read nothing
    for i, own in enumerate(ours):
        state = loaded if len(ours) == 1 else loaded.get(i, {})
        plain = theirs[min(i, len(theirs) - 1)]
        both = {name: value for name, value in plain.items() if name != "param_state"}
        both["optimizer"] = dict(plain["optimizer"])  # one saved optimizer may stand for two
        keep_own_settings(both, own)
        arranged.append(both | {"param_state": state.get("param_state", {})})
    return arranged[0] if len(ours) == 1 else dict(enumerate(arranged))


def check_kind(described: dict, saved: dict, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError, on every rank alike, where the state is cut over data-parallel ranks in one of them only.

    Args:
        described, saved: as of `fit_optimizer_state`.
    """
    ours, theirs = (
        any("param_state_sharding_type" in part for part in parts_of(state)) for state in (described, saved)
    )
    if saved and ours != theirs:
        said = f"optimizer.distributed={str(theirs).lower()}"
        raise CheckpointError(
            f"{checkpoint.path} was saved with {said}, whose state this run's optimizer cannot take",
            hint=f"continue with {said} (and without parallel.fsdp=both where that is false), or start anew from its "
            "weights as student.checkpoint",
        )


def keep_own_settings(state: dict, own: dict) -> None:
    """Puts this run's own hyperparameters into the loaded state of one optimizer: learning rates, betas, decay.

    Megatron would go on with the saved ones, or (0.19) finds no group for its own.
    """
    if "optimizer" in state:  # within Megatron's optimizers with float32 weights of their own
        state, own = state["optimizer"], own["optimizer"]
    if any("params" in group for group in state["param_groups"]):  # torch's own, which name their parameters
        mine = {kind_of(group): group for group in own["param_groups"]}
        for group in state["param_groups"]:
            settings = mine.get(kind_of(group), {})
            group.update({name: value for name, value in settings.items() if name not in ("params", "step")})
    else:  # the distributed one's: settings and the count of steps, the same in all
        counts = [group["step"] for group in state["param_groups"] if "step" in group]
        steps = {"step": max(counts)} if counts else {}
        state["param_groups"] = [group | steps for group in own["param_groups"]]


def side_by_side(loaded: dict, described: dict) -> list[tuple[dict, dict]]:
    """The states of single optimizers that have been read, each with our own description of it."""
    numbers = sorted(name for name in loaded if isinstance(name, int))
    return [(loaded[number], described[number]) for number in numbers] or [(loaded, described)]


def kind_of(group: dict) -> tuple:
    """What tells the groups of parameters of one optimizer apart, whatever the hyperparameters."""
    return tuple(group.get(name) for name in GROUP_KEYS)


def share_steps(described: dict) -> dict:
    """The state with one count of steps: an optimizer without parameters on this rank has counted none."""
    groups = [
        group for part in parts_of(described) if "optimizer" in part for group in part["optimizer"]["param_groups"]
    ]
    steps = max((group["step"] for group in groups if "step" in group), default=None)
    for group in groups:
        if "step" in group:
            group["step"] = steps
    return described


def parts_of(state: dict) -> list[dict]:
    """The states of single optimizers, in order."""
    numbers = sorted(name for name in state if isinstance(name, int))
    return [state[number] for number in numbers] or [state]


def check_master_weights(optimizer, state: dict, checkpoint: Checkpoint) -> None:
    """The weights that the optimizer goes on from are those of the model, which are loaded already.

    Megatron without the mend of `megatron_on_cpu.mends` writes others, and training would go on from them.

    Args:
        optimizer: of the model; its state is not loaded yet.
        state: what it will be given.
    Raises:
        CheckpointError: on every rank; they are not.
    Collectives: one all-gather of a short text.
    """
    failure = None
    for one, part in zip(getattr(optimizer, "chained_optimizers", [optimizer]), parts_of(state), strict=True):
        places = [p for buffer in getattr(one, "buffers", []) for p in buffer.param_index_map]
        for number, tensors in part.get("param_state", {}).items():
            weight, master = places[number].data, tensors["param"].detach()
            if type(weight) is not torch.Tensor:  # of 8 bits, with scales of its own
                continue
            failure = failure or different_weight(weight, master.to(weight.device).view_as(weight), checkpoint)
    fail_together(failure)


def different_weight(weight: Tensor, master: Tensor, checkpoint: Checkpoint) -> CheckpointError | None:
    """The error where an optimizer's copy is not, rounded to the weight's type, the weight."""
    same = master.to(weight.dtype) == weight
    if weight.dtype == torch.float32:  # of a run that was in bf16 before, the weights were saved in that
        same |= master.bfloat16() == weight
    wrong = (~same).sum().item()
    if not wrong:
        return None
    return CheckpointError(
        f"{checkpoint.path}: the optimizer's copy of a weight of shape {list(weight.shape)} is another one "
        f"({wrong:,} of {weight.numel():,} values)",
        hint="a fault of Megatron-Core that megakd has mended has written it; go on from an older "
        "checkpoint, or start anew from its weights, which are whole, as student.checkpoint",
    )
