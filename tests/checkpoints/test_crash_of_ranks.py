"""A power cut while several ranks save one checkpoint: their file operations, in the order they happened, replayed."""

import pytest
import torch

from megakd.checkpoints import folder
from megakd.publish import publish_text
from tests.checkpoints.test_record import MODEL, describe, replay
from tests.file_operations import crash_states, operations, recorded
from tests.ranks import run_ranks
from tests.training import small


def save(rank, ranks, run_dir, log, asynchronous):
    """Steps 2 and 4 at tp 2; the second save is recorded by every rank."""
    with small.layout(tp=2) as groups:
        from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

        from megakd.checkpoints import torch_dist
        from megakd.config import Model

        def save_step(step):
            part_WH = torch.arange(7 * 5.0).view(7, 5) + 100 * rank + step
            state = {
                "weight": ShardedTensor.from_rank_offsets("weight", part_WH, (0, rank, 2)),
                "moment": ShardedTensor.from_rank_offsets("moment", -part_WH, (0, rank, 2)),
                "random": ShardedObject("random", {"rank": rank, "step": step}, (2,), (rank,)),
                "step": step,
            }
            path = folder.step_folder(run_dir, step)

            def publish(written):
                parts = {"model": Model.model_validate(MODEL), "step": step, "training": True, "metrics": {"loss": 1.5}}
                folder.publish(path, tokenizer=None, written=written, run=folder.run_id(run_dir), **parts)

            pending = torch_dist.save(path, state, groups, publish, asynchronous=asynchronous)
            if asynchronous:
                pending.complete()

        save_step(2)
        torch.distributed.barrier()
        with recorded(run_dir, log):
            torch.distributed.barrier()
            save_step(4)
            torch.distributed.barrier()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_crash_while_ranks_save_leaves_the_old_checkpoint_or_the_new_one_too(tmp_path, asynchronous):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    publish_text(run_dir / folder.RUN_ID_FILE, "run-a\n")
    run_ranks(2, save, run_dir, tmp_path / "log", asynchronous)
    order = [(name, path) for name, path, *_ in operations(tmp_path / "log")[1:]]
    new = "checkpoints/step_00000004.incomplete"
    described = next(place for place, (_, path) in enumerate(order) if path.startswith(f"{new}/.metadata"))
    for rank in (0, 1):
        assert ("fsync", f"{new}/__{rank}_0.distcp") in order[:described], "a rank's file may be on another machine"
    before, after = replay(tmp_path)
    assert [name for name, *_ in before] == ["step_00000002"] and after[0] == before[0] and len(after) == 2
    ends = {describe(state) for _, state in crash_states(tmp_path / "log", tmp_path / "ends", at_the_end=True)}
    assert ends == {after}, "the save has returned, and the checkpoint is not durable"
