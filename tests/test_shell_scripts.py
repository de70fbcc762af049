"""Shell scripts: bash reads them, shellcheck (where it is installed) has nothing to say."""

import pathlib
import re
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = [
    path
    for pattern in ("examples/*/*.sh", "examples/*/*.sbatch", "tools/**/*.sh", ".ci/run")
    for path in sorted(ROOT.glob(pattern))
]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_are_clean(path):
    assert subprocess.run(["bash", "-n", path], capture_output=True, text=True).stderr == ""
    if shutil.which("shellcheck"):
        seen = subprocess.run(["shellcheck", "-x", path.name], cwd=path.parent, capture_output=True, text=True)
        assert seen.returncode == 0, seen.stdout


def test_options_of_jobs_stand_before_the_first_command():
    """sbatch ignores the others, in silence."""
    for path in ROOT.glob("examples/slurm/*.sbatch"):
        lines = path.read_text().splitlines()
        first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
        assert any(line.startswith("#SBATCH") for line in lines[:first])
        assert not any(line.startswith("#SBATCH") for line in lines[first:]), path


def test_what_jobs_export_wins_over_an_image():
    """Unbuffered output is wanted by all."""
    text = (ROOT / "examples" / "slurm" / "common.sh").read_text()
    (kept,) = re.findall(r'--container-env="([\w,]+)"', text)
    assert set(kept.split(",")) == set(re.findall(r"^export (\w+)=", text, re.MULTILINE)) - {"PYTHONUNBUFFERED"}
