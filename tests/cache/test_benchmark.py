import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def test_the_benchmark_runs_and_the_sizes_are_as_promised(tmp_path):
    command = [sys.executable, "tools/benchmarks/cache.py", "--quick", "--json", str(tmp_path / "figures.json")]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=300)
    codecs = json.loads((tmp_path / "figures.json").read_text())["codecs"]
    for codec, most in (("q8", 182), ("fp16", 246)):
        assert codecs[codec]["bytes_per_token_256"] <= most and codecs[codec]["bytes_per_token_4096"] <= most
