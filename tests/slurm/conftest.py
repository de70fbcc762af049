"""A Slurm of two nodes on this machine, once for all of these tests; skipped where its programs or root are missing."""

import os
import pathlib
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
CLUSTER = ROOT / "tools" / "slurm" / "cluster.sh"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}


class Cluster:
    """Commands on its controller."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder

    def run(self, *command: str, **variables: str) -> str:
        done = subprocess.run(
            [CLUSTER, "run", self.folder, *command],
            env=os.environ | variables, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(f"{command}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def submit(self, *arguments: str, **variables: str) -> str:
        """The job's number."""
        return self.run("sbatch", "--parsable", *arguments, **variables)

    def job(self, number: str) -> dict[str, str]:
        words = self.run("scontrol", "show", "job", "-o", number).split()
        return dict(word.partition("=")[::2] for word in words if "=" in word)

    def wait(self, number: str, condition, seconds: float = 240):
        """Wait until condition(job) is true; a requeued job does not wait for its minutes to pass."""
        deadline = time.monotonic() + seconds
        while not condition(job := self.job(number)):
            assert time.monotonic() < deadline, job
            if job["JobState"] == "PENDING" and job["Restarts"] != "0":
                self.start_now(number)
            time.sleep(0.3)
        return job

    def start_now(self, number: str) -> None:
        """A pending job, unless it has started since."""
        try:
            self.run("scontrol", "update", f"JobId={number}", "StartTime=now")
        except RuntimeError as error:
            if "no longer pending" not in str(error):
                raise

    def link(self, node: str, state: str) -> None:
        """A node's network cable: `down` or `up`."""
        subprocess.run(["ip", "-n", "megakd-controller", "link", "set", f"to-{node}", state], check=True, timeout=30)

    def wait_for_end(self, number: str) -> dict[str, str]:
        return self.wait(number, lambda job: job["JobState"] in ENDED)


@pytest.fixture
def cluster(two_nodes):
    yield two_nodes
    two_nodes.run("scancel", "--user=root")  # of a test that failed


@pytest.fixture(scope="session")
def two_nodes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    up = subprocess.run([CLUSTER, "up", folder], capture_output=True, text=True, timeout=120)
    if up.returncode == 2:
        pytest.skip(up.stderr.strip())
    try:
        assert up.returncode == 0, up.stderr
        yield Cluster(folder)
    finally:
        subprocess.run([CLUSTER, "down", folder], timeout=120, check=True)
