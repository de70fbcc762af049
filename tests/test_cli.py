"""The command line: light help, explained errors, exit codes."""

import ast
import os
import pathlib
import re
import subprocess
import sys

import pytest

import megakd
from megakd import cli
from megakd.errors import ConfigError, TrainingError

ROOT = pathlib.Path(__file__).parent.parent
HEAVY = ("torch", "megatron", "transformers", "numpy", "triton", "sentencepiece")
PROBE = f"""
import sys
from megakd.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as ended:
    code = ended.code
print("HEAVY", [name for name in {HEAVY} if name in sys.modules], "CODE", code)
"""


def run_cli(*arguments, environ=None, code="import sys; from megakd.cli import main; sys.exit(main(sys.argv[1:]))"):
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", **(environ or {})}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environ, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def verb(monkeypatch):
    """Makes `megakd probe` call a function."""

    def install(function, is_run=True):
        monkeypatch.setitem(cli.VERBS, "probe", cli.Verb("nowhere:main", "", is_run))
        monkeypatch.setattr(cli, "load_target", lambda verb: function)

    return install


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in cli.VERBS)])
def test_help_loads_nothing_heavy(arguments):
    result = run_cli(*arguments, code=PROBE)
    assert result.stdout.splitlines()[-1] == "HEAVY [] CODE 0", result.stdout + result.stderr


def test_every_verb_points_at_a_function():
    for name, verb in cli.VERBS.items():
        module, _, function = verb.target.partition(":")
        path = ROOT / (module.replace(".", "/") + ".py")
        names = [node.name for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.FunctionDef)]
        assert function in names, f"{name} -> {verb.target}"


def test_help_names_every_verb_and_section():
    text = cli.format_help()
    for word in (*cli.VERBS, "optimizer", "schedule", "--version"):
        assert f"\n  {word} " in text


def test_help_of_a_run_lists_the_keys():
    result = run_cli("train", "run.yaml", "--help")
    assert result.returncode == 0
    assert "usage: megakd train CONFIG.yaml [key=value ...]" in result.stdout
    assert "\n  optimizer.lr            required  number > 0\n      Peak learning rate." in result.stdout


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in cli.VERBS)])
def test_help_fits_into_100_columns(arguments):
    result = run_cli(*arguments)
    assert result.returncode == 0 and not [line for line in result.stdout.splitlines() if len(line) > 100]


def test_help_of_evaluate_says_what_is_measured():
    """Every figure that it prints, by its name."""
    text = cli.format_run_help("evaluate", cli.VERBS["evaluate"])
    losses = (ROOT / "megakd" / "losses.py").read_text("utf-8")
    figures = re.findall(r'^    "(\w+)": "\w*tokens",$', losses, re.MULTILINE)
    assert len(figures) == 7
    exact = ("forward_kl", "reverse_kl", "top5_agreement", "bits_per_byte")
    for name in (*figures, *exact, "perplexity", "accuracy", "ece"):
        assert re.search(rf"^  (\w+, )?{name}\b", text, re.MULTILINE), name


def test_python_dash_m():
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-m", "megakd", "--version"], env=environ, capture_output=True, text=True)
    assert result.stdout == f"megakd {megakd.__version__}\n"


def test_a_wrong_config_is_one_paragraph_and_a_hint(tmp_path):
    (tmp_path / "run.yaml").write_text("train: {stepz: 3}\n")
    result = run_cli("train", str(tmp_path / "run.yaml"), "optimizer.lr=-1")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("ConfigError: ") and "Traceback" not in result.stderr
    assert "train.stepz: unknown key; did you mean train.steps?" in result.stderr
    assert "optimizer.lr: -1, expected number > 0 (set on the command line)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("hint: ")


def test_arguments_and_exit_codes(verb, capsys):
    seen = []
    verb(lambda argv: seen.append(argv))
    assert cli.main(["probe", "run.yaml", "a=b"]) == 0 and seen == [["run.yaml", "a=b"]]
    verb(lambda argv: 3)
    assert cli.main(["probe"]) == 3
    verb(lambda argv: seen.append(argv), is_run=False)
    assert cli.main(["probe", "--help"]) == 0 and seen[-1] == ["--help"]
    assert capsys.readouterr().err == ""


def test_unknown_and_missing_verbs(capsys):
    assert cli.main(["trian"]) == 2
    assert "no verb `trian`; did you mean `train`?\nhint: one of train, " in capsys.readouterr().err
    assert cli.main([]) == 2
    assert "usage: megakd VERB" in capsys.readouterr().err


def raising(error):
    def function(argv):
        raise error

    return function


def test_explained_errors(verb, capsys, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    verb(raising(TrainingError("loss is nan", hint="lower it")))
    assert cli.main(["probe"]) == 1
    assert capsys.readouterr().err == "TrainingError: loss is nan\nhint: lower it\n"


def test_other_local_ranks_are_brief(verb, capsys, monkeypatch):
    slept = []
    monkeypatch.setattr(cli.time, "sleep", slept.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "9")
    verb(raising(ConfigError("first line\nsecond", hint="h")))
    assert cli.main(["probe"]) == 1
    assert capsys.readouterr().err == "rank 9: ConfigError: first line\n"
    assert slept == [cli.GRACE_SECONDS]  # rank 0 is not killed while it speaks


def test_help_into_a_closed_pipe_is_no_bug():
    command = f"{sys.executable} -m megakd train --help | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[0].startswith("megakd train: ") and done.stdout.splitlines()[1] in ("141", "0")
    assert done.stderr == ""


def test_interrupt_and_bugs(verb, capsys):
    verb(raising(KeyboardInterrupt()))
    assert cli.main(["probe"]) == 130
    assert capsys.readouterr().err.startswith("megakd probe: interrupted")
    verb(raising(ZeroDivisionError("a bug keeps its traceback")))
    with pytest.raises(ZeroDivisionError):
        cli.main(["probe"])
