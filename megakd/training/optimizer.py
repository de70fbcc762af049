"""Megatron's data-parallel wrapper, optimizer and parameter scheduler from the config."""

import logging

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megakd.config import Config
from megakd.models.gpt import DTYPES, GPT
from megakd.training.fully_sharded import FullySharded
from megakd.training.megatron_fsdp import FullyShardedByMegatron

LOG = logging.getLogger("megakd")
STYLES = {"constant": "constant", "cosine": "cosine", "linear": "linear", "wsd": "WSD"}


def wrap_data_parallel(gpt: GPT, config: Config, groups) -> list[DistributedDataParallel | FullySharded]:
    """Megatron DDP of each stage on this rank, or FSDP: gradients in fp32, summed (not averaged) over dp; the loss
    divides by tokens at the end."""
    gpt.config.finalize_model_grads_func = finalize_model_grads
    if config.parallel.shards("student"):
        by_megatron = config.parallel.fsdp_by == "megatron"
        if by_megatron and groups.dp_cp.size() == 1:  # Megatron-FSDP 0.16 then doubles gradients with every micro-batch
            LOG.info("parallel.fsdp_by: no rank shares the student with another, so torch's FSDP has it whole")
            by_megatron = False
        return [(FullyShardedByMegatron if by_megatron else FullySharded)(gpt, groups)]
    overlap = overlaps_reduction(gpt, groups)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        use_distributed_optimizer=config.optimizer.distributed,
        average_in_collective=False,
    )
    ddp = [  # later chunks need no buckets: their reduction as a whole hides behind the chunks before them
        DistributedDataParallel(gpt.config, ddp_config, chunk, disable_bucketing=i > 0, pg_collection=groups)
        for i, chunk in enumerate(gpt.chunks)
    ]
    for chunk in ddp:
        chunk.broadcast_params()
    no_sync = [chunk.no_sync for chunk in ddp]
    gpt.config.no_sync_func = (no_sync if len(ddp) > 1 else no_sync[0]) if overlap else None
    return ddp


def overlaps_reduction(gpt: GPT, groups) -> bool:
    """Whether gradients are reduced bucket by bucket while the backward goes on; on a CPU that gains nothing."""
    return next(gpt.parameters()).is_cuda and groups.dp_cp.size() > 1


def build_optimizer(ddp: list[DistributedDataParallel], config: Config, steps: int, groups):
    """Returns Megatron's optimizer (AdamW on fp32 master weights) and its parameter scheduler, whose unit is steps."""
    section, schedule = config.optimizer, config.schedule
    sharded = isinstance(ddp[0], FullySharded)  # its weights are the main weights, and cut already
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=section.lr,
            min_lr=section.min_lr,
            weight_decay=section.weight_decay,
            adam_beta1=section.beta1,
            adam_beta2=section.beta2,
            adam_eps=section.eps,
            clip_grad=section.clip_grad,
            params_dtype=torch.float32 if sharded else DTYPES[config.train.precision],
            bf16=config.train.precision == "bf16" and not sharded,
            use_distributed_optimizer=section.distributed and not sharded,
        ),
        ddp,
        use_gloo_process_groups=False,
        pg_collection=groups,
    )
    if sharded:  # as with the distributed optimizer, norms are sums over all ranks' rows
        for one in getattr(optimizer, "chained_optimizers", [optimizer]):
            one.grad_stats_parallel_group = groups.intra_dist_opt
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=section.lr,
        min_lr=section.min_lr,
        lr_warmup_steps=schedule.warmup_steps,
        lr_decay_steps=schedule.decay_steps or steps,
        lr_decay_style=STYLES[schedule.kind],
        start_wd=section.weight_decay,
        end_wd=section.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        wsd_decay_steps=schedule.wsd_decay_steps,
        lr_wsd_decay_style=schedule.wsd_decay_style,
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    gpt_config = ddp[0].module.config
    gpt_config.grad_scale_func = optimizer.scale_loss
    return optimizer, scheduler


def memory_peak_bytes(device: torch.device) -> int:
    """Largest memory in use so far: of the GPU on cuda, resident memory of the process on cpu."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
