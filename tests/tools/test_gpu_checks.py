"""tools/gpu/check_kernels.py without a GPU: every part to its end, and what becomes of one that does not get there."""

import functools
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
import torch

from megakd.divergences import DIVERGENCES
from tests.kernels.test_triton import needs_triton, side_by_side

ROOT = pathlib.Path(__file__).parents[2]
GPU_TOOLS = ROOT / "tools" / "gpu"
INTERPRETED = {
    "TRITON_INTERPRET": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": f"{pathlib.Path(__file__).parent / 'interpreted'}:{ROOT}",
}
sys.path.append(str(GPU_TOOLS))

import check_kernels  # noqa: E402

ROWS = {
    "passes": {
        "rows.statistics", "rows.backward, in place", "rows.extremes", "rows.summarize", "scan_rows", "take_entries",
    },
    "losses": {
        "torch.topk and logsumexp", "select_top_k", "select_and_predict", "kd_loss forward", "kd_loss, in place",
        "dense_kd_loss, in place", "sample_targets", "predict",
    },
    "head": {
        "product", "linear_select_top_k", "output layer, then kd_loss, in place", "linear_kd_loss",
        "linear_kd_loss, gradient in forward", "linear_kd_loss, gradient in forward, soft cap",
    },
    "merge": {"a rank's selection and loss"},
    "steps": {"training step"},
    "te": {"transformer_engine"},
    "checks": {
        "statistics", "backward", "extremes", "summarize", "selection", "loss", "dense", "sampling", "head", "softcap",
    },
}  # fmt: skip


def run(output, *arguments):
    environment = os.environ | (INTERPRETED if "cpu" in arguments else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, str(GPU_TOOLS / "check_kernels.py"), "--output", str(output), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)
    return done, json.loads(output.read_text())


PARTS = (("passes", "losses", "head"), ("merge", "steps", "te", "checks"))  # a process more each costs seconds


@pytest.fixture(scope="module")
def started(request, tmp_path_factory):
    tiny = ("--device", "cpu", "--tiny", "--seconds", "780", "--parts")
    jobs = {
        f"test_every_part_gets_to_its_end[{' '.join(parts)}]": functools.partial(
            run, tmp_path_factory.mktemp("dry") / "gpu.json", *tiny, *parts
        )
        for parts in PARTS
    }
    with side_by_side(request, jobs) as futures:
        yield futures


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(850)
@pytest.mark.parametrize("parts", PARTS, ids=" ".join)
def test_every_part_gets_to_its_end(parts, started, request):
    """Everything but the device's events, on the smallest sizes."""
    done, report = started[request.node.name].result()
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(report["parts"]) == list(parts) and report["machine"]["triton"]
    for name, part in report["parts"].items():
        rows = part["rows"]
        assert part["status"] == "done" and {row["name"] for row in rows} == ROWS[name]
        assert all(row["seconds"] > 0 for row in rows if name not in ("te", "checks"))
        assert all(row["verdict"] == "right" for row in rows if name in ("merge", "checks"))
        if name == "losses":
            for form in ("kd_loss, in place", "dense_kd_loss, in place"):
                assert {row["divergence"] for row in rows if row["name"] == form} == set(DIVERGENCES)
            assert all(row["share_of_copy_bandwidth"] > 0 for row in rows)
        if name == "steps":
            assert [row["kind"] for row in rows] == ["KD, live teacher", "KD, recorded teacher", "CE"]
            assert all(row["tokens_per_second"] > 0 and row["flops"] > 0 for row in rows)
        if name == "merge":
            assert [row["gathered_bytes_per_token"] for row in rows] == [2 * 2 + 16 + 40, 2 * 2 + 16 + 40 + 8]
    assert "nothing was found wrong" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_part_that_fails_is_recorded_and_the_next_goes_on(tmp_path):
    done, report = run(tmp_path / "gpu.json", "--tiny", "--parts", "passes", "te")
    assert done.returncode == 1
    for part in report["parts"].values():
        assert part["status"] == "failed" and "torch sees no GPU" in part["error"] and part["rows"] == []
    assert done.stdout.endswith("passes: failed\nte: failed\n")


@needs_triton
def test_what_was_found_in_time_is_kept(tmp_path, monkeypatch):
    """Time is up when the first row is there, long before the part is done."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    arguments = ["--device", "cpu", "--tiny", "--output", str(tmp_path / "gpu.json")]
    options, report = check_kernels.parse(arguments), {"parts": {}}

    class Clock:
        sleep = staticmethod(time.sleep)

        def monotonic(self):
            return 9.0 * any(part["rows"] for part in report["parts"].values())

    monkeypatch.setattr(check_kernels, "time", Clock())
    for name in ("passes", "te"):
        check_kernels.run_part(name, arguments, options, report, deadline=5.0)
    kept = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert [part["status"] for part in kept.values()] == ["out of time", "not run: out of time"]
    assert 1 <= len(kept["passes"]["rows"]) < 6 and kept["te"]["rows"] == []


def test_something_wrong_ends_in_status_1_and_rows_are_in_the_file_at_once(monkeypatch, tmp_path, capsys):
    rows, output, seen = tmp_path / "rows", tmp_path / "gpu.json", []

    def run_part(name, argv, options, report, deadline):
        part = report["parts"][name] = {"status": "done", "seconds": 1.0, "rows": []}
        for row in ({"name": "loss", "worst": 1.5, "verdict": "WRONG"}, {"name": "te", "version": None}):
            with rows.open("a") as lines:
                lines.write(json.dumps(row) + "\n" + '{"name": "half of a ro')
            check_kernels.take_rows(rows, part, options, report)
            rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:-1]))
            seen.append(len(json.loads(output.read_text())["parts"][name]["rows"]))

    monkeypatch.setattr(check_kernels, "run_part", run_part)
    monkeypatch.setattr(check_kernels, "describe_machine", lambda options: {})
    assert check_kernels.main(["--output", str(output), "--parts", "checks"]) == 1
    assert seen == [1, 2] and capsys.readouterr().out.endswith("checks: loss is WRONG\n")


@needs_triton
def test_a_check_that_does_not_run_is_wrong_and_keeps_nobody_from_running():
    code = (
        "import kernel_checks as k; f = lambda p: 1 / 0; f.__name__ = 'check_it'; "
        "r = k.judge(f, 'somewhere', None); assert r['verdict'] == 'WRONG' and r['name'] == 'it', r; "
        "r = k.judge(lambda p: float('nan'), '', None); assert r['verdict'] == 'WRONG'; "
        "kinds = [(d, t, a) for _, _, d, t, a in k.problems(False)]; assert len(kinds) == 13; "
        "assert len({(d, t) for d, t, _ in kinds}) == len({(d, a) for d, _, a in kinds}) == 6"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{GPU_TOOLS}:{GPU_TOOLS.parents[1]}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
