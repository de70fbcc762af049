"""The optimizer's state where gradients are reduced in several padded buckets, as they are on GPUs."""

import pytest

from tests.ranks import run_ranks
from tests.training import small

STUDENT = {"num_layers": 4, "hidden_size": 24, "ffn_hidden_size": 23}  # of odd sizes, so that every bucket is padded
STEPS = 5


def train(rank, ranks, run_dir, bucket_size, steps, precision="fp32", mended=True):
    """Losses and gradient norms of the steps up to one; from a checkpoint in run_dir, or into one, if it is given."""
    from megakd.megatron_on_cpu import install

    install("cpu")
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from megakd.checkpoints.folder import read_checkpoint
    from megakd.errors import CheckpointError
    from megakd.training.checkpointing import Progress, Saver, resume

    describe = DistributedOptimizer.sharded_param_state_fully_reshardable
    with pytest.MonkeyPatch.context() as patch, small.in_buckets(bucket_size), small.layout() as groups:
        if not mended:
            patch.setattr(DistributedOptimizer, "sharded_param_state_fully_reshardable", describe.megakd_upstream)
        changes = {"run__dir": str(run_dir), "train__global_batch_size": 12, "train__precision": precision}
        config = small.config(student__model=small.student_section(**STUDENT), **changes)
        run = small.student_step(config, groups, **STUDENT)
        buckets = [bucket for chunk in run.ddp for buffer in chunk.buffers for bucket in buffer.buckets]
        if bucket_size:
            assert any(bucket.numel_unpadded < bucket.grad_data.numel() for bucket in buckets[:-1])
        progress = Progress()
        if run_dir and (run_dir / "checkpoints").exists():
            try:
                progress = resume(run, read_checkpoint(run_dir))
            except CheckpointError as error:
                return str(error)
        done = range(progress.step, steps)
        seen = [run(small.batch(step % 2, groups, 1, 12), step=step + 1, measure=True) for step in done]
        if run_dir and not progress.step:
            progress.step = steps
            Saver(config, run, config.student.model, tokenizer=None).save(progress, {})
    return [(numbers["loss"], numbers["grad_norm"]) for numbers in seen]


@pytest.mark.parametrize("writers", [2, 3])
def test_it_is_that_of_every_parameter_and_goes_on_at_any_number_of_ranks(tmp_path, writers):
    whole = run_ranks(1, train, None, None, STEPS)[0]
    written = run_ranks(writers, train, tmp_path, 3000, 2)
    for ranks, bucket_size in ((writers, 3000), (1, None), (5 - writers, 3000)):
        for got in run_ranks(ranks, train, tmp_path, bucket_size, STEPS):
            assert [*written[0], *got] == [pytest.approx(numbers, rel=2e-5) for numbers in whole]


@pytest.mark.parametrize(("before", "after"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_a_run_may_go_on_in_another_precision(tmp_path, before, after):
    written = run_ranks(2, train, tmp_path, 3000, 2, before)
    (loss, _), *_ = run_ranks(2, train, tmp_path, 3000, STEPS, after)[0]
    assert loss == pytest.approx(written[0][0][0], rel=0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_upstream_writes_is_refused(tmp_path, precision):
    """It is still wrong there: its last parameters end with zeros, and the others are shifted."""
    run_ranks(2, train, tmp_path, 3000, 2, precision, False)
    messages = run_ranks(2, train, tmp_path, 3000, STEPS, precision)
    for message in messages:
        assert "the optimizer's copy of a weight of shape" in message and "start anew from its weights" in message
