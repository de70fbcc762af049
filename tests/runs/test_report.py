"""`megakd report`: one file, whole or not there; errors that say what to do; nothing heavy is loaded."""

import os
import pathlib
import subprocess
import sys

import pytest

from megakd.cli import main
from tests.reporting import made

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    return made.write(tmp_path / "runs" / "a", made.lines_of(5), torn="{")


def test_it_writes_a_page_beside_nothing_else(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", "runs/a"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "a: the last line of metrics.jsonl was cut off: left out",
        "report.html: a; open it in a browser",
    ]
    assert sorted(os.listdir()) == ["report.html", "runs"] and os.listdir("runs") == ["a"]
    text = pathlib.Path("report.html").read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and text.endswith("</html>\n")


def test_an_old_page_is_replaced_or_stays(folder, tmp_path, monkeypatch, capsys):
    output = tmp_path / "page.html"
    output.write_text("old")
    monkeypatch.setattr(os, "replace", full_disk)
    assert main(["report", str(folder), "--output", str(output)]) == 1
    assert "page.html cannot be written: No space left on device" in capsys.readouterr().err
    assert output.read_text() == "old" and sorted(os.listdir(tmp_path)) == ["page.html", "runs"]
    monkeypatch.undo()
    assert main(["report", str(folder), "--output", str(output)]) == 0
    assert output.read_text(encoding="utf-8").startswith("<!doctype html>")


def full_disk(*arguments):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("output", ["nowhere/page.html", "runs"])
def test_a_page_that_cannot_be_written(folder, tmp_path, monkeypatch, capsys, output):
    monkeypatch.chdir(tmp_path)
    assert main(["report", "runs/a", "--output", output]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"ReportError: {output} cannot be written") and "hint: --output names a file" in error
    assert sorted(os.listdir()) == ["runs"]


def test_what_is_no_run_is_refused_before_anything_is_written(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", "runs/a", "runs"]) == 1
    error = capsys.readouterr().err
    assert (
        error.startswith("ReportError: runs is no run: it holds no metrics.jsonl") and "megakd report runs/a" in error
    )
    assert not (tmp_path / "report.html").exists()


def test_nothing_heavy_is_loaded(folder, tmp_path):
    probe = (
        "import sys; from megakd.cli import main; code = main(sys.argv[1:]); "
        "print([name for name in ('torch', 'numpy', 'pydantic', 'matplotlib', 'tqdm') if name in sys.modules], code)"
    )
    command = [sys.executable, "-c", probe, "report", str(folder), "--output", str(tmp_path / "page.html")]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=60)
    assert done.stdout.splitlines()[-1] == "[] 0", done.stdout + done.stderr
