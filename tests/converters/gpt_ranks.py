"""What tests run on ranks: our GPT loaded from a checkpoint folder by Megatron, and the parity gate."""

import contextlib
import dataclasses
import pathlib

import torch

from megakd.megatron_on_cpu import install


@contextlib.contextmanager
def groups_of(tp: int, pp: int = 1, ep: int = 1):
    install("cpu")
    from megakd.models.groups import build_groups, destroy_groups

    try:
        yield build_groups(tp, pp, seed=0, ep=ep)
    finally:
        destroy_groups()


def gate(rank: int, ranks: int, hf_path: pathlib.Path, megatron_path: pathlib.Path, model):
    """The gate's findings at tp = ranks, as plain values: the caller need not import Megatron."""
    with groups_of(ranks) as groups:
        from megakd.converters.parity.compare import compare
        from megakd.converters.parity.gate import as_checkpoint

        parity = compare(hf_path, as_checkpoint(megatron_path, model), groups)
        return dataclasses.asdict(parity) | {"passed": parity.passed, "report": parity.report()}


def megatron_logits(rank: int, ranks: int, megatron_path: pathlib.Path, model, ids_PS: torch.Tensor, pp: int = 1):
    """[P, S, V] on the last pipeline stage's first rank, loaded by Megatron at tp = ranks / pp; else None."""
    import torch.distributed as dist

    with groups_of(ranks // pp, pp) as groups, torch.no_grad():
        from megakd.checkpoints.torch_dist import load_weights
        from megakd.config import Parallel, Train
        from megakd.converters.parity.gate import as_checkpoint
        from megakd.models.forward_only import forward_only
        from megakd.models.gpt import build_gpt
        from megakd.models.micro_batch import MicroBatch

        train = Train(steps=1, global_batch_size=1, precision="fp32")
        parallel = Parallel(tp=ranks // pp, pp=pp)
        sizes = {"vocab_size": model.vocab_size, "padded_size": 1024}
        gpt = build_gpt(model, parallel, train, groups, **sizes, device="cpu", seed=3).eval()
        load_weights(gpt, as_checkpoint(megatron_path, model), groups)
        batch = MicroBatch(ids_PS, ids_PS)
        kept = forward_only(gpt, [batch], lambda hidden_SBH, micro_batch: gpt.logits(hidden_SBH), groups)
        if not kept:
            return None
        parts = [torch.empty_like(kept[0]) for _ in range(groups.tp.size())]
        dist.all_gather(parts, kept[0].contiguous(), group=groups.tp)
        logits_SPV = torch.cat(parts, 1)[:, : model.vocab_size].unflatten(0, (ids_PS.shape[1], -1))
        return logits_SPV.transpose(0, 1) if groups.tp.rank() == 0 else None


def load_and_save(
    rank: int, ranks: int, source: pathlib.Path, target: pathlib.Path, pp: int, precision: str, tp=None, ep: int = 1
) -> None:
    """Load a checkpoint at tp = ranks / pp, or another, and let Megatron save it again, as training does."""
    tp = tp or ranks // pp
    with groups_of(tp, pp, ep) as groups:
        from megakd.checkpoints import folder, torch_dist
        from megakd.config import Parallel, Train
        from megakd.models.gpt import build_gpt

        checkpoint = folder.read_checkpoint(source)
        train = Train(steps=1, global_batch_size=1, precision=precision)
        parallel, sizes = (
            Parallel(tp=tp, pp=pp, ep=ep),
            {"vocab_size": checkpoint.model.vocab_size, "padded_size": 1024},
        )
        gpt = build_gpt(checkpoint.model, parallel, train, groups, **sizes, device="cpu", seed=3)
        torch_dist.load_weights(gpt, checkpoint, groups)
        parts = {"model": checkpoint.model, "step": 7, "tokenizer": None, "training": False, "metrics": {}}
        torch_dist.save(
            target,
            {"model": gpt.sharded_state_dict(metadata=torch_dist.sharding_metadata(groups))},
            groups,
            lambda written: folder.publish(target, origin=checkpoint.path, written=written, **parts),
        )
