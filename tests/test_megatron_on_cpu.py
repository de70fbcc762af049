"""The device seam, and that each mend of megatron-core is still needed: without it, upstream's failure is seen."""

import contextlib
import logging
import subprocess
import sys

import pytest

from megakd.megatron_on_cpu.importing import is_for_users, warn_of_version
from tests.ranks import run_ranks
from tests.training import small


def test_installs_quietly_and_answers_for_cuda():
    code = (
        "from megakd.megatron_on_cpu import install\n"
        "install('cpu'); install('cpu')\n"
        "import torch\n"
        "assert torch.zeros(2, device='cuda').device.type == 'cpu'\n"
        "assert torch.zeros(2).type() == 'torch.cuda.FloatTensor'\n"
        "assert torch.zeros(2).half().cuda().device.type == 'cpu'\n"
        "assert torch.cuda.current_device() == torch.device('cpu')\n"
        "assert torch.Generator(device='cuda').device.type == 'cpu'\n"
        "import sys, megatron.core.fusions.fused_bias_swiglu\n"
        "assert 'torch._inductor.compile_fx' not in sys.modules, 'four seconds of every rank'\n"
        "assert torch.compile.__module__ == 'torch'\n"
    )
    done = subprocess.run([sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Apex" not in done.stderr and "Transformer Engine" not in done.stderr


def optimizer_round_trip(rank, ranks, upstream_method, steps_before=2):
    """Train, save, load into a fresh optimizer, train on; optionally with one method of Megatron as it was.

    Returns the loss after the load, that of a run that was not interrupted, and every parameter's step counter.
    """
    from megakd.megatron_on_cpu import install

    install("cpu")
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer as cls

    from megakd.training.checkpointing import training_state

    names = ("_set_main_param_and_optimizer_states", "load_state_dict", "sharded_state_dict")
    with contextlib.ExitStack() as stack:
        if upstream_method:
            mended = getattr(cls, upstream_method)
            setattr(cls, upstream_method, cls.megakd_upstream[names.index(upstream_method)])
            stack.callback(setattr, cls, upstream_method, mended)
        groups = stack.enter_context(small.layout())
        first, second = (small.student_step(small.config(), groups) for _ in range(2))
        for i in range(steps_before):
            first(small.batch(i, groups, 8), step=i + 1, measure=False)
        try:
            state = save_and_load(training_state(first, loading=False), training_state(second, loading=True))
        except (KeyError, AssertionError) as error:
            return type(error).__name__
        second.gpt.load_state_dict(state["model"])
        try:
            second.optimizer.load_state_dict(state["optimizer"])
        except KeyError as error:
            return type(error).__name__
        second.scheduler.step(increment=steps_before)
        batch = small.batch(9, groups, 8)
        second(batch, step=steps_before + 1, measure=False)
        inner = second.optimizer.chained_optimizers[0].optimizer
        return {float(state["step"]) for state in inner.state.values()}


def save_and_load(state, into):
    import tempfile

    from megatron.core import dist_checkpointing

    with tempfile.TemporaryDirectory() as folder:
        dist_checkpointing.save(state, folder)
        return dist_checkpointing.load(into, folder)


def test_a_loaded_optimizer_counts_its_steps_right():
    assert run_ranks(1, optimizer_round_trip, None) == [{3.0}]


def test_upstream_still_looks_up_a_step_that_is_not_saved():
    assert run_ranks(1, optimizer_round_trip, "_set_main_param_and_optimizer_states") == ["KeyError"]


def test_upstream_still_shares_one_step_counter():
    (steps,) = run_ranks(1, optimizer_round_trip, "load_state_dict")
    assert max(steps) > 3


def test_upstream_still_cannot_describe_a_fresh_optimizer():
    assert run_ranks(1, optimizer_round_trip, "sharded_state_dict") == ["AssertionError"]


@pytest.mark.parametrize(
    ("version", "warned"),
    [("0.16.1", 0), ("0.17.0rc1", 0), ("0.19.2", 0), ("0.19.7", 0), ("0.20.0", 1), ("0.15.3", 1), ("1.0", 1)],
)
def test_a_version_that_was_not_tried_is_named(version, warned, caplog):
    warn_of_version(version)
    assert len(caplog.messages) == warned
    assert all(f"megatron-core {version}: megakd was tested with 0.16.1 to 0.19.2" in said for said in caplog.messages)


def test_advice_to_megatrons_own_users_is_left_out():
    said = [logging.makeLogRecord({"msg": text}) for text in ("GPTModel IS DEPRECATED. Please", "GPTModel is wrong")]
    assert [is_for_users(record) for record in said] == [False, True]
