"""The job scripts of examples/slurm under a real Slurm: two nodes, gloo, the signals that Slurm really sends."""

import json
import os
import pathlib
import re
import subprocess
import sys
import time

import pytest

from tests.slurm.conftest import ROOT
from tests.training import runs

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
EXAMPLES = ROOT / "examples" / "slurm"
SIZE = ("--gpus-per-node=1", "--cpus-per-task=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("tokens")
    runs.prepare(made)
    return made


@pytest.fixture
def variables(tmp_path):
    """What a user exports before sbatch."""
    drop = {name: os.environ[name] for name in os.environ if name.startswith("SLURM_")}
    assert not drop, "inside a job already"
    return {
        "HERE": str(EXAMPLES), "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "RUN_DIR": str(tmp_path / "run"),
        "RANKS_PER_NODE": "1", "OMP_NUM_THREADS": "1", "SAVE_SECONDS": "60",
    }  # fmt: skip


def reference(folder, tmp_path, config):
    """Metrics of the same run on two ranks without Slurm, which nobody ended."""
    config = config | {"run": config["run"] | {"dir": str(tmp_path / "reference")}}
    ranks = runs.by_hand(tmp_path, 2, "train", config)
    said = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    return runs.lines(tmp_path / "reference")


def wait_for_steps(cluster, number, run_dir, least):
    def there(job):
        path = run_dir / "metrics.jsonl"
        assert job["JobState"] in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), log(run_dir)
        return path.exists() and path.read_text().count('"kind": "train"') >= least

    cluster.wait(number, there)


def log(run_dir: pathlib.Path) -> str:
    return "".join(path.read_text() for path in sorted(run_dir.parent.glob("*.log")))


def test_a_job_that_is_preempted_and_asked_to_stop_ends_as_one_that_was_left_alone(
    cluster, folder, variables, tmp_path
):
    """GraceTime: only the ranks are told, the script requeues by stopped.json. USR1: only the script is told."""
    config = runs.values(folder, tmp_path / "run", train__steps=150, checkpoint__every_steps=50)
    want = reference(folder, tmp_path, config)
    config = runs.write_config(tmp_path, config)
    run_dir, output = tmp_path / "run", f"--output={tmp_path}/%j.log"
    number = cluster.submit(
        "--nodes=2", *SIZE, output, str(EXAMPLES / "train.sbatch"), "log.every_steps=1", **variables, CONFIG=config
    )
    wait_for_steps(cluster, number, run_dir, 5)
    urgent = cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", output, "--wrap=true")
    cluster.wait_for_end(urgent)
    cluster.wait(number, lambda job: int(job["Restarts"]) >= 1)
    first = json.loads((run_dir / "stopped.json").read_text())
    assert first["finished"] is False and 5 <= first["step"] < 150, log(run_dir)
    wait_for_steps(cluster, number, run_dir, first["step"] + 5)
    cluster.run("scancel", "--batch", "--signal=USR1", number)
    cluster.wait(number, lambda job: int(job["Restarts"]) >= 2)
    job = cluster.wait_for_end(number)
    assert job["JobState"] == "COMPLETED", log(run_dir)
    assert json.loads((run_dir / "stopped.json").read_text()) == {"step": 150, "finished": True}
    assert runs.lines(run_dir) == want


def test_scancel_ends_a_job_for_good_with_a_checkpoint(cluster, folder, variables, tmp_path):
    """Two tasks on a node are two ranks, without torchrun."""
    config = runs.write_config(tmp_path, runs.values(folder, tmp_path / "run", train__steps=5000))
    run_dir, output = tmp_path / "run", f"--output={tmp_path}/%j.log"
    script = str(EXAMPLES / "train.sbatch")
    number = cluster.submit("--nodes=1", "--ntasks-per-node=2", *SIZE, output, script, **variables, CONFIG=config)
    wait_for_steps(cluster, number, run_dir, 3)
    ours = [line for line in processes().splitlines() if f"-m megakd train {config}" in line and "srun" not in line]
    assert len(ours) == 2 and not any("torch.distributed.run" in line for line in ours), ours
    cluster.run("scancel", number)
    job = cluster.wait_for_end(number)
    stopped = json.loads((run_dir / "stopped.json").read_text())
    assert stopped["finished"] is False and job["Restarts"] == "0", log(run_dir)
    assert (run_dir / "checkpoints" / f"step_{stopped['step']:08d}" / "megakd.json").exists()


def test_a_node_whose_network_is_cut_is_named_and_ends_the_job(cluster, folder, variables, tmp_path):
    """No connection breaks: nothing is said any more. The rank that was cut off ends, too.

    It is cut in a step: how long a save may take the watch cannot say.
    """
    config = runs.values(folder, tmp_path / "run", train__steps=100_000, checkpoint__every_steps=100)
    config["run"]["watchdog_seconds"] = 10
    config, run_dir = runs.write_config(tmp_path, config), tmp_path / "run"
    output, script = f"--output={tmp_path}/%j.log", str(EXAMPLES / "train.sbatch")
    number = cluster.submit("--nodes=2", *SIZE, output, script, **variables, CONFIG=config)
    wait_for_steps(cluster, number, run_dir, 105)
    cluster.link("n2", "down")
    try:
        cluster.wait(number, lambda job: "rank 0 stopped: " in log(run_dir), 120)
        deadline = time.monotonic() + 150  # it waits a minute for the store
        while ranks := [line for line in processes().splitlines() if f" -u -m megakd train {config}" in line]:
            assert time.monotonic() < deadline, ranks
            time.sleep(0.5)
    finally:
        cluster.link("n2", "up")
    job = cluster.wait_for_end(number)
    lost = r"rank 0 stopped: rank 1 is stuck: .*no answer within 10 s from rank 1 \(process \d+ on n2\)"
    assert re.search(lost, log(run_dir)) and job["Restarts"] == "0" and not (run_dir / "stopped.json").exists(), log(
        run_dir
    )
    assert list((run_dir / "checkpoints").glob("step_*0/megakd.json"))


def processes() -> str:
    return subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True, check=True).stdout


PROGRAM = """
import sys, torch, torch.distributed as dist
from megakd.ranks import Ranks
with Ranks("cpu", rendezvous_seconds=60) as ranks:
    total = torch.ones(())
    dist.all_reduce(total)
    sys.stdout.write(f"rank {ranks.rank} of {int(total)} at {ranks.launch.address}\\n")
"""


def test_tasks_on_two_nodes_find_each_other(cluster, variables, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    said = cluster.run("srun", "--nodes=2", "--ntasks=2", sys.executable, str(program), **variables)
    assert sorted(said.splitlines()) == ["rank 0 of 2 at n1", "rank 1 of 2 at n1"]


def test_torchruns_that_nobody_told_of_each_other_are_refused(cluster, folder, variables, tmp_path):
    config = runs.write_config(tmp_path, runs.values(folder, tmp_path / "run"))
    alone = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m", "megakd"]
    with pytest.raises(RuntimeError, match="srun has started 2 torchruns, which do not know of each other"):
        cluster.run("srun", "--nodes=2", "--ntasks=2", *alone, "train", config, **variables)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("*.sbatch")))
def test_slurm_takes_the_options_of_every_script(cluster, variables, script):
    for line in (EXAMPLES / script).read_text().splitlines():
        assert not line.startswith("#SBATCH") or line.startswith("#SBATCH --"), line
    cluster.run("sbatch", "--test-only", "--gpus-per-node=1", str(EXAMPLES / script))
