"""The process groups of a run: Megatron's parallel_state, set up once and then passed around as a value."""

import contextlib

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection


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


def destroy_groups() -> None:
    """End the groups, so that another layout can be set up in the same processes.

    Megatron only forgets them; their threads (gloo's wake a hundred times a second) would live on. Its embeddings of
    positions, which have a group, are kept by the cache of what they computed.
    """
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
