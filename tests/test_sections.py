"""What NVIDIA's ft_launcher is told of a rank, and what it makes of it; `make test-ft-launcher` fetches it."""

import importlib.util
import json
import logging
import os
import pathlib
import signal
import sys
import time

import pytest

from megakd.ranks.pulse import Pulse
from megakd.ranks.sections import SOCKET, watched_sections
from tests import forked
from tests.test_launch import ROOT, environment, script  # noqa: F401
from tests.training import runs

LAUNCHER = "nvidia_resiliency_ext.fault_tolerance.launcher"
PATHS = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
LIMITS = ["--ft-rank-section-timeouts", "setup:120,step:6,checkpointing:120", "--ft-workload-check-interval", "0.5"]
with_launcher = pytest.mark.skipif(
    importlib.util.find_spec("nvidia_resiliency_ext") is None, reason="nvidia-resiliency-ext is not there"
)


def ft_launcher(*arguments, ranks=2):
    given = ["--nproc-per-node", ranks, "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{forked.free_port()}"]
    given += [*LIMITS, "--ft-enable-nic-monitor", "false", *arguments]
    return forked.Forked(LAUNCHER, *given, environment=environment(PYTHONPATH=PATHS), together=True)


def test_without_ft_launcher_nothing_is_imported_and_without_the_package_it_is_said(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext", None)  # importing it fails
    with caplog.at_level(logging.WARNING, "megakd"):
        assert watched_sections({}) is None
        assert not caplog.records
        assert watched_sections({SOCKET: "/nowhere"}) is None
    assert "ft_launcher hears nothing of this rank" in caplog.text


@with_launcher
def test_sections_that_the_launcher_has_limits_for_follow_the_marks(tmp_path, monkeypatch, caplog):
    """The client is connected to a real monitor, in a process of its own."""
    from nvidia_resiliency_ext.fault_tolerance import FaultToleranceConfig, RankMonitorServer

    limits = {"setup": 60.0, "checkpointing": None}
    config = FaultToleranceConfig(rank_section_timeouts=limits, enable_nic_monitor=False)
    monitor = RankMonitorServer.run_in_subprocess(config, f"{tmp_path}/socket")
    try:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv(SOCKET, f"{tmp_path}/socket")
        sections, pulse = watched_sections(os.environ), Pulse()
        client, pulse.listener = sections._client, sections.mark
        seen, told = [], client.timeouts_calc
        for phase in ("data", "step", "data", "step", "save", "validation", "export"):
            pulse.mark(phase, 1)
            seen.append(sorted(told.open_sections))
        assert seen == [["setup"], ["setup"], [], [], ["checkpointing"], [], []]
        assert told.count == 7, "a heartbeat at every mark"
        monitor.terminate()
        monitor.join()
        pulse.mark("save", 2)
        assert "does not answer" in caplog.text
        pulse.mark("end", 2)
    finally:
        monitor.kill()


HANGS_ONCE = """
from megakd.ranks.launch import read_launch
with Ranks("cpu") as ranks:
    ranks.agree_to_stop()
    for step in range(1, 5):
        ranks.pulse.mark("step", step)
        if step == 3 and ranks.rank == 1 and ranks.launch.attempt == 0:
            time.sleep(600)
        dist.barrier()
    ranks.pulse.mark("save", step)
    time.sleep(8)  # longer than a step may take
    dist.barrier()
    os.write(1, f"rank {ranks.rank} saved in attempt {ranks.launch.attempt}\\n".encode())
"""


@with_launcher
@pytest.mark.slow
def test_a_rank_that_hangs_in_a_step_is_killed_and_a_save_may_take_longer(script):  # noqa: F811
    process = ft_launcher("--max-restarts", 1, script(HANGS_ONCE))
    try:
        said, _ = process.communicate(150)
    finally:
        process.kill()
    assert process.returncode == 0, said
    assert "Section 'step' has been open for" in said and "Section 'checkpointing'" not in said, said
    assert said.count(" saved in attempt 1") == 2 and "saved in attempt 0" not in said


@with_launcher
@pytest.mark.slow
def test_sigterm_to_the_launcher_leaves_a_checkpoint(tmp_path):
    runs.prepare(tmp_path)
    run_dir = tmp_path / "run"
    config = runs.write_config(tmp_path, runs.values(tmp_path, run_dir, train__steps=100_000))
    process = ft_launcher("-m", "megakd", "train", config)
    try:
        deadline = time.monotonic() + 120
        while not (run_dir / "metrics.jsonl").exists() or "train" not in (run_dir / "metrics.jsonl").read_text():
            assert time.monotonic() < deadline and process.poll() is None, pathlib.Path(process.output.name).read_text()
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(120)
    finally:
        process.kill()
    stopped = json.loads((run_dir / "stopped.json").read_text())
    assert stopped["finished"] is False, said
    assert (run_dir / "checkpoints" / f"step_{stopped['step']:08d}" / "megakd.json").exists()
