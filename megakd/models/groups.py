"""The process groups of a run: Megatron's parallel_state, set up once and then passed around as a value."""

import contextlib
import copy
import dataclasses
import datetime

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection

TIMEOUT = datetime.timedelta(minutes=30)  # Megatron's own of its groups


def build_groups(tp: int, pp: int, seed: int, *, cp: int = 1, ep: int = 1) -> ProcessGroupCollection:
    """Split the ranks over the axes and seed Megatron's random states.

    Args:
        tp, pp: sizes of the axes; the rest of the ranks is data-parallel.
        cp: ranks that every sequence is cut over.
        ep: ranks of a pipeline stage that the experts of a layer are divided among; above 1 no expert is cut over tp.
        seed: of dropout; differs by stage and shard as Megatron has it, never by data-parallel rank.
    Returns:
        Megatron's collection of groups; `.tp`, `.pp`, `.dp`, `.cp`, `.dp_cp` (ranks that see
        other tokens), `.ep`, `.expt_tp` are torch process groups.
    Collectives: makes groups, on all ranks.
    """
    parallel_state.initialize_model_parallel(
        tp,
        pp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=1 if ep > 1 else tp,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return ProcessGroupCollection.use_mpu_process_groups()


@dataclasses.dataclass(frozen=True)
class WiderGroups:
    """Those of a teacher whose tensor parallel ranks are the ranks of several student replicas.

    Attributes:
        groups: as of build_groups, for its layers.
        sharing: the ranks at one place of those replicas; they see other micro-batches, and run each other's.
    """

    groups: ProcessGroupCollection
    sharing: dist.ProcessGroup

    def destroy(self) -> None:
        """End what build_groups does not know of."""
        for group in (self.groups.tp, self.groups.dp, self.groups.mp, self.sharing):
            dist.destroy_process_group(group)


def build_wider_groups(groups: ProcessGroupCollection, tp: int) -> WiderGroups:
    """Groups of the same ranks for a model of another tp, a multiple of the groups' own; without cp and ep.

    Megatron's own state stays that of `groups`; the model's layers are given theirs.

    Collectives: makes groups, on all ranks.
    """
    own, world = groups.tp.size(), dist.get_world_size()
    stage = world // groups.pp.size()
    firsts = range(0, world, tp)  # of the wider replicas, stage after stage
    members = {
        "tp": [range(first, first + tp) for first in firsts],
        "sharing": [range(first + place, first + tp, own) for first in firsts for place in range(own)],
        "dp": [range(start + place, start + stage, tp) for start in range(0, world, stage) for place in range(tp)],
        "mp": [[rank for start in range(first, world, stage) for rank in range(start, start + tp)]
               for first in range(0, stage, tp)],
    }  # fmt: skip
    made = {
        name: dist.new_subgroups_by_enumeration([list(ranks) for ranks in each], timeout=TIMEOUT)[0]
        for name, each in members.items()
    }
    wider = copy.copy(groups)
    same = {"tp": ("tp", "tp_cp", "expt_tp", "tp_ep"), "dp": ("dp", "dp_cp", "expt_dp"), "mp": ("mp", "tp_ep_pp")}
    for name, places in same.items():
        for place in places:
            setattr(wider, place, made[name])
    return WiderGroups(wider, made["sharing"])


def destroy_groups(wider: WiderGroups | None = None) -> None:
    """End the groups, so that another layout can be set up in the same processes.

    Megatron only forgets them; their threads (gloo's wake a hundred times a second) would live on. Its embeddings of
    positions, which have a group, are kept by the cache of what they computed.
    """
    if wider:
        wider.destroy()
    globals_ = [value if isinstance(value, list | tuple) else [value] for value in vars(parallel_state).values()]
    groups = {g for values in globals_ for g in values if isinstance(g, dist.ProcessGroup)} - {dist.group.WORLD}
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_global_memory_buffer()
    for group in sorted(groups, key=lambda group: group.group_name):
        with contextlib.suppress(ValueError):  # Megatron still names one that ended earlier
            dist.destroy_process_group(group)
    for embedding in (RotaryEmbedding, YarnRotaryEmbedding):
        embedding.forward.cache_clear()


def is_last_stage(groups: ProcessGroupCollection) -> bool:
    return groups.pp.rank() == groups.pp.size() - 1


def layout(groups: ProcessGroupCollection) -> dict[str, int]:
    """Sizes of the axes, as checkpoints record them."""
    sizes = {"tp": groups.tp.size(), "pp": groups.pp.size(), "dp": groups.dp.size()}
    return sizes | ({"cp": groups.cp.size()} if groups.cp.size() > 1 else {})
