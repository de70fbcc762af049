"""Ends a small run over and over, in every way and at random moments, and checks that nothing is lost or left.

    python tools/soak.py FOLDER [--ends 50] [--kinds term kill-rank ...] [--modes sync async] [--limit-seconds N]

A run is launched under torchrun, ended at a random moment, launched again in the same folder, and so on until its last
step; then another one begins, until every kind of end has had its number. After each end: everything is gone within
60 seconds (else the end counts as a hang), no process is left, the folder's lock is free, and after a signal
stopped.json names the step of the newest checkpoint. After each run: metrics lines and checkpoint files are bit-equal
to those of a run that nobody ended, and no temporary file is left. Prints one JSON line for each kind and mode.
"""

import argparse
import collections
import dataclasses
import fcntl
import filecmp
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent
MARK = "MEGAKD_SOAK"  # in the environment of all processes of a launch, by which those left over are found
GONE_SECONDS = 60
START_SECONDS = 240
KINDS = (
    "term", "int", "term-twice", "term-rank", "usr1-rank", "int-rank",
    "kill-rank", "kill-ranks", "kill-torchrun",
)  # fmt: skip
UNREPEATABLE = {  # and every key that ends with _seconds
    "seconds", "tokens_per_second", "tflops_per_rank", "peak_memory_bytes", "slowest_rank", "slowest_over_median",
}  # fmt: skip


@dataclasses.dataclass
class Soak:
    """Where a soak works, and what every run of it looks like.

    Attributes:
        folder: data, reference and runs.
        steps: of a run.
        ranks: of a launch.
        seed: of the moments.
    """

    folder: pathlib.Path
    steps: int = 60
    ranks: int = 2
    seed: int = 1

    def __post_init__(self):
        self.random = random.Random(self.seed)

    def prepare(self) -> None:
        """Data, and the run that nobody ends."""
        self.prepare_data()
        if not self.stopped(self.folder / "reference").get("finished"):
            with Launch(self, self.folder / "reference", asynchronous=False) as launch:
                if launch.process.wait(600) != 0:
                    raise SystemExit(f"the reference run failed: {launch.output.read_text()}")

    def prepare_data(self) -> None:
        from megakd.runs.prepare import main

        self.folder.mkdir(parents=True, exist_ok=True)
        text = [str(ROOT / "megakd" / name) for name in ("cli.py", "errors.py", "targets.py", "losses.py")]
        tokenizer = f"{self.folder}/tokenizer.model"
        if not (self.folder / "validation.json").exists():
            main(["tokenizer", "--input", *text, "--output", tokenizer, "--vocab-size", "400"])
            for name, files in (("train", text[:2]), ("validation", text[2:])):
                main(["text", "--input", *files, "--tokenizer", tokenizer, "--output", f"{self.folder}/{name}"])

    def config(self, run_dir: pathlib.Path, asynchronous: bool) -> dict:
        model = {
            "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4,
            "num_query_groups": 2, "max_sequence_length": 32, "hidden_dropout": 0.1,
        }  # fmt: skip
        data = {
            "train": f"{self.folder}/train", "validation": f"{self.folder}/validation",
            "tokenizer": f"{self.folder}/tokenizer.model", "sequence_length": 32,
        }  # fmt: skip
        return {
            "run": {"dir": str(run_dir), "device": "cpu", "timeout_seconds": 300},
            "student": {"model": model},
            "data": data,
            "train": {"steps": self.steps, "micro_batch_size": 2, "global_batch_size": 8, "precision": "fp32"},
            "optimizer": {"lr": 1e-2},
            "eval": {"samples": 32, "every_steps": 5},
            "checkpoint": {"every_steps": 3, "asynchronous": asynchronous},
            "log": {"progress": False},
        }

    @staticmethod
    def stopped(run_dir: pathlib.Path) -> dict:
        try:
            return json.loads((run_dir / "stopped.json").read_text())
        except OSError:
            return {}


class Launch:
    """One torchrun over a run folder, and all its processes."""

    def __init__(self, soak: Soak, run_dir: pathlib.Path, asynchronous: bool):
        self.soak, self.run_dir = soak, run_dir
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        self.mark = f"{os.getpid()}.{time.monotonic_ns()}"
        self.output = run_dir.with_suffix(".log")
        config = run_dir.with_suffix(".yaml")
        config.write_text(yaml.safe_dump(soak.config(run_dir, asynchronous)))
        self.lines_before = self.lines()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), MARK: self.mark}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={soak.ranks}"]
        with open(self.output, "w") as output:
            self.process = subprocess.Popen(
                [*command, "-m", "megakd", "train", str(config)],
                cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> "Launch":
        return self

    def __exit__(self, *_) -> None:
        for pid in self.left():  # none, unless the soak itself was ended
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def lines(self) -> int:
        path = self.run_dir / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def left(self) -> list[int]:
        """Processes of this launch that are there, zombies not counted."""
        mark, found = f"{MARK}={self.mark}".encode(), []
        for folder in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
            except OSError:
                continue
        return found

    def rank_pids(self) -> list[int]:
        """In the order of ranks."""
        found = {}
        for pid in self.left():
            try:
                pairs = pathlib.Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
                parent = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
            except OSError:
                continue
            rank = dict(pair.partition("=")[::2] for pair in pairs if pair).get("RANK")
            if rank is not None and int(parent) == self.process.pid:
                found[int(rank)] = pid
        return [found[rank] for rank in sorted(found)]

    def wait_for_moment(self) -> bool:
        """Wait until it has trained a random number of steps, and a little more; False when it ended before."""
        more = self.soak.random.randint(1, 14)
        deadline = time.monotonic() + START_SECONDS
        while self.lines() <= self.lines_before or self.lines() < more:
            if self.process.poll() is not None or time.monotonic() > deadline:
                return self.process.poll() is None
            time.sleep(0.01)
        target = self.lines() + more
        while self.lines() < target and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(self.soak.random.uniform(0, 0.2))
        return self.process.poll() is None

    def end(self, kind: str) -> None:
        ranks = self.rank_pids()
        one = self.soak.random.choice(ranks) if ranks else None
        number = {"term": signal.SIGTERM, "int": signal.SIGINT, "usr1": signal.SIGUSR1, "kill": signal.SIGKILL}
        what, _, whom = kind.partition("-")
        targets = {"": [self.process.pid], "torchrun": [self.process.pid], "twice": [self.process.pid] * 2}
        for pid in targets.get(whom, ranks if whom == "ranks" else [one] if one else []):
            try:
                os.kill(pid, number[what])
            except ProcessLookupError:
                continue
            if whom == "twice":
                time.sleep(0.1)

    def wait_until_gone(self) -> list[int]:
        """What is still there after the time that an end may take; it is killed then."""
        deadline = time.monotonic() + GONE_SECONDS
        while time.monotonic() < deadline:
            self.process.poll()
            left = self.left()
            if not left:
                return []
            time.sleep(0.1)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        return left


def soak_kind(soak: Soak, kind: str, asynchronous: bool, ends: int, until: float) -> dict:
    """End runs `ends` times in one way; returns the counts."""
    counts = collections.Counter(ends=0, hangs=0, runs=0)
    name = f"{kind}_{'async' if asynchronous else 'sync'}"
    problems: list[str] = []
    number = 0
    while counts["ends"] < ends and time.monotonic() < until and len(problems) < 10:
        run_dir = soak.folder / "runs" / f"{name}_{number}"
        shutil.rmtree(run_dir, ignore_errors=True)
        launches = 0
        while not soak.stopped(run_dir).get("finished") and launches < 100:
            launches += 1
            with Launch(soak, run_dir, asynchronous) as launch:
                more = counts["ends"] < ends and time.monotonic() < until
                ended = more and launch.wait_for_moment()
                if ended:
                    launch.end(kind)
                    counts["ends"] += 1
                    counts["hangs"] += bool(launch.wait_until_gone())
                elif launch.process.wait(600) != 0:
                    problems.append(f"{run_dir.name}: launch {launches} failed: {launch.output.read_text()[-2000:]}")
                    break
            seen = after_an_end(run_dir, kind if ended else "")
            problems += [f"{run_dir.name}, launch {launches}: {problem}" for problem in seen]
            print(f"{run_dir.name}, launch {launches}: {dict(counts)}, {len(problems)} problems", file=sys.stderr)
        if soak.stopped(run_dir).get("finished"):
            counts["runs"] += 1
            wrong = differences(soak.folder / "reference", run_dir)
            problems += [f"{run_dir.name}: {problem}" for problem in wrong]
            if not wrong:
                shutil.rmtree(run_dir)
        number += 1
    return {"kind": kind, "asynchronous": asynchronous, **counts, "problems": problems}


def after_an_end(run_dir: pathlib.Path, kind: str) -> list[str]:
    """What is not as it should be right after everything is gone."""
    problems = []
    with open(run_dir / "owner.lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problems.append("the lock is held")
    whole = sorted(f.name for f in run_dir.glob("checkpoints/step_????????") if (f / "megakd.json").exists())
    if kind.startswith(("term", "int", "usr1")):
        step = Soak.stopped(run_dir).get("step")
        newest = int(whole[-1][5:]) if whole else 0
        if step is None or step != newest:
            output = run_dir.with_suffix(".log").read_text()[-2000:]
            problems.append(f"stopped.json says {step}, the newest checkpoint is of step {newest}: {output}")
    return problems


def differences(reference: pathlib.Path, run_dir: pathlib.Path) -> list[str]:
    """Where a finished run is not the reference, bit by bit."""
    problems = []
    for kind in ("train", "validation"):
        want, seen = measured(reference, kind), measured(run_dir, kind)
        if want != seen:
            first = next(
                (i for i, (a, b) in enumerate(zip(want, seen, strict=False)) if a != b), min(len(want), len(seen))
            )
            problems.append(f"{len(seen)} {kind} lines for {len(want)}, the first other one is number {first}")
    last = sorted((reference / "checkpoints").glob("step_????????"))[-1]
    for file in sorted(last.glob("*.distcp")):
        other = run_dir / "checkpoints" / last.name / file.name
        if not other.exists() or not filecmp.cmp(file, other, shallow=False):
            problems.append(f"{last.name}/{file.name} is another one")
    left = [f for f in run_dir.rglob("*") if f.name.endswith((".tmp", ".new", ".incomplete"))]
    return problems + [f"{f} is left" for f in left]


def measured(run_dir: pathlib.Path, kind: str) -> list[dict]:
    entries = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in e.items() if k not in UNREPEATABLE and not k.endswith("_seconds")}
        for e in entries
        if e["kind"] == kind
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--ends", type=int, default=50, help="of each kind and mode (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--modes", nargs="+", choices=("sync", "async"), default=("sync", "async"))
    parser.add_argument("--steps", type=int, default=60, help="of a run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit-seconds", type=float, default=float("inf"), help="no further end after that")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the launch under way
    soak = Soak(arguments.folder.resolve(), steps=arguments.steps, seed=arguments.seed)
    soak.prepare()
    until, bad = time.monotonic() + arguments.limit_seconds, 0
    for kind in arguments.kinds:
        for mode in arguments.modes:
            result = soak_kind(soak, kind, mode == "async", arguments.ends, until)
            bad += len(result["problems"]) + result.get("hangs", 0)
            print(json.dumps(result), flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
