"""The project's own files agree with each other and with the code."""

import ast
import importlib.metadata
import pathlib
import re
import subprocess
import sys

import pytest

import megakd

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
MODULES = {
    "pyyaml": "yaml",
    "megatron-core": "megatron",
    "transformer-engine": "transformer_engine",
    "lm-eval": "lm_eval",
}
NEVER_INSTALLED = {"nvidia_resiliency_ext"}  # imported where its launcher has started the ranks
DOCKER_INSTRUCTIONS = {"ARG", "FROM", "LABEL", "WORKDIR", "COPY", "RUN", "ENV", "USER", "ENTRYPOINT", "CMD"}


def package(requirement):
    return re.match(r"[A-Za-z0-9._-]+", requirement).group().lower()


def logical_lines(path):
    """Lines of a Dockerfile without comments, continued lines joined."""
    lines = [line for line in path.read_text("utf-8").splitlines() if line.strip() and not line.startswith("#")]
    return "\n".join(lines).replace("\\\n", " ").splitlines()


def imports(folder):
    """What is imported below a folder beside Python's own: name of the package -> a file that does."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for top in {name.partition(".")[0] for name in names} - sys.stdlib_module_names:
                found.setdefault(top, str(path.relative_to(ROOT)))
    return found


def test_the_version_stands_in_one_place():
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "megakd.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", megakd.__version__)
    others = [path.name for path in ROOT.glob("*") if path.is_file() and path.suffix in (".py", ".toml", ".txt")
              if f'"{megakd.__version__}"' in path.read_text("utf-8")]  # fmt: skip
    assert not others


def test_extras():
    assert {"dev", "cuda", "plots", "wandb", "eval", "fsdp"} == set(EXTRAS)
    imported = set(imports(ROOT / "megakd")) | {"transformer_engine"}  # which megatron-core imports
    for requirement in EXTRAS["cuda"] + EXTRAS["plots"] + EXTRAS["wandb"] + EXTRAS["eval"] + EXTRAS["fsdp"]:
        name = package(requirement)
        assert MODULES.get(name, name) in imported, f"an extra that nothing uses: {name}"
    everything = PROJECT["project"]["dependencies"] + [r for requirements in EXTRAS.values() for r in requirements]
    assert "apex" not in map(package, everything)
    assert "transformer-engine[pytorch]>=2.9.0a0,<2.12" in EXTRAS["cuda"]
    (triton,) = [r for r in EXTRAS["dev"] if package(r) == "triton"]
    assert "==3.7.*" in triton and "sys_platform == 'linux'" in triton and "platform_machine == 'x86_64'" in triton


def test_every_dependency_has_a_lower_bound_and_megatron_an_upper_one():
    for requirement in PROJECT["project"]["dependencies"]:
        assert ">=" in requirement, requirement
    assert "megatron-core>=0.16.1,<0.20" in PROJECT["project"]["dependencies"]


def test_what_the_package_imports_is_declared():
    core = {package(requirement) for requirement in PROJECT["project"]["dependencies"]}
    extras = {package(requirement) for requirements in EXTRAS.values() for requirement in requirements}
    known = {MODULES.get(name, name.replace("-", "_")) for name in core | extras} | {"megakd"} | NEVER_INSTALLED
    assert not {top: path for top, path in imports(ROOT / "megakd").items() if top not in known}


PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


def test_constraints_and_classifiers_are_of_the_same_pythons():
    said = [c.rpartition(" ")[2] for c in PROJECT["project"]["classifiers"] if "Python :: 3." in c]
    files = sorted(path.name for path in (ROOT / "constraints").iterdir())
    assert said == PYTHONS and files == [f"python{version}.txt" for version in PYTHONS]
    assert PROJECT["project"]["requires-python"] == f">={PYTHONS[0]}"


@pytest.mark.parametrize("version", PYTHONS)
def test_constraints_pin_every_dependency_of_development(version):
    lines = (ROOT / "constraints" / f"python{version}.txt").read_text("utf-8").splitlines()
    head = [line for line in lines if line.startswith("#")]
    assert lines[: len(head)] == head and f"on CPython {version}." in "".join(head) and "Run with it: " in "".join(head)
    pins = dict(line.split("==") for line in lines[len(head) :])
    assert list(pins) == sorted(pins, key=str.lower) and len(pins) == len(lines) - len(head)
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    for requirement in PROJECT["project"]["dependencies"] + EXTRAS["dev"] + EXTRAS["plots"]:
        name = package(requirement).replace("_", "-")
        assert name in pins or name == "megakd", f"{name} is not pinned"
    newest = version in ("3.12", "3.13")  # Megatron-Core 0.17 and later need Python 3.12
    assert pins["torch"] == "2.13.0" and pins["megatron-core"] == ("0.19.2" if newest else "0.16.1")


def test_make_takes_the_constraints_of_its_python(tmp_path):
    def plan(version, *flags):
        python = tmp_path / f"python{version}"
        python.write_text(f"#!/bin/sh\necho {version}\n")
        python.chmod(0o755)
        command = ["make", "-B", *flags, "check", f"PYTHON={python}"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    for version in PYTHONS:
        assert f"-c constraints/python{version}.txt -e '.[dev]'" in plan(version, "-n").stdout
    refused = plan("3.99")
    assert refused.returncode != 0 and "constraints/python3.99.txt is missing" in refused.stderr
    assert "hint: make PYTHON=python3.12" in refused.stderr and "-m venv" not in refused.stdout


def test_the_command_is_installed_under_its_name():
    assert PROJECT["project"]["scripts"] == {"megakd": "megakd.cli:main"}
    try:
        scripts = importlib.metadata.distribution("megakd").entry_points
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("megakd is not installed here")
    assert [script.value for script in scripts if script.name == "megakd"] == ["megakd.cli:main"]


def test_makefile_targets():
    for target in ("quickstart", "test", "test-megatron", "test-slurm", "test-ft-launcher", "check", "bench"):
        plan = subprocess.run(["make", "-n", "-B", target], cwd=ROOT, capture_output=True, text=True)
        assert plan.returncode == 0, plan.stderr
        assert "-c constraints/python3." in plan.stdout and "-e '.[dev]'" in plan.stdout, (
            f"{target} does not set up its environment"
        )
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True).stdout
    assert re.findall(r"^make ([\w-]+)", listed, re.MULTILINE) == [
        "help",
        "quickstart",
        "test",
        "test-nightly",
        "test-megatron",
        "test-slurm",
        "test-ft-launcher",
        "check",
        "format",
        "bench",
    ]
    plan = subprocess.run(["make", "-n", "test", "ARGS=-k x"], cwd=ROOT, capture_output=True, text=True).stdout
    assert re.search(r"OMP_NUM_THREADS=1 TORCH_COMPILE_DISABLE=1 \S+ -m pytest -n 2 .*-k x", plan)


def test_ci_runs_check_and_test():
    script = ROOT / ".ci" / "run"
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    text = script.read_text("utf-8")
    assert "set -euo pipefail\n" in text and text.endswith("make check\nmake test-megatron\nmake test\n")


def test_dockerfile():
    lines = [line.split(maxsplit=1) for line in logical_lines(ROOT / "Dockerfile")]
    assert {name for name, _ in lines} == DOCKER_INSTRUCTIONS
    assert lines[0][0] == "ARG" and lines[0][1].startswith("BASE_IMAGE=") and lines[1] == ["FROM", "${BASE_IMAGE}"]
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    for _, arguments in (line for line in lines if line[0] == "COPY"):
        for source in arguments.split()[:-1]:
            assert f"!{source}" in allowed and (ROOT / source).exists(), source
    system, install = [arguments for name, arguments in lines if name == "RUN"]
    assert " tini " in system and "useradd" in system
    assert "-c base-packages.txt" in install and " -e " not in install and "--index-url" not in install
    assert install.startswith("--mount=type=cache,") and "--no-cache-dir" not in install
    last = dict(lines)  # of several of one name, the last
    assert last["USER"] == "10001" and last["ENTRYPOINT"] == '["tini", "--", "megakd"]'
    assert [name for name, _ in lines].index("USER") > max(i for i, line in enumerate(lines) if line[0] == "RUN")


def names_of_code(text):
    """(file, name in it or None) of what a page calls `package/file`, `file.py` or `package/file.name`."""
    for quoted in re.findall(r"`([\w./]+)`", text):
        place, slash, last = quoted.rpartition("/")
        stem, _, name = last.partition(".")
        if not slash and not name:
            continue  # a word of the line's own
        yield f"{place}{slash}{stem}", None if name in ("", "py") else name


def defined_in(path):
    """Names of a module, and those of its classes as Class.name."""
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
            yield from (f"{node.name}.{n.name}" for n in getattr(node, "body", []) if isinstance(n, ast.FunctionDef))


def test_the_page_to_enter_by_names_what_is_there():
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    ours = [path for name in ("megakd", "tests") for path in (ROOT / name).rglob("*")]
    known = {str(path.relative_to(ROOT).with_suffix("")): path for path in ours if path.suffix == ".py"}
    known |= {str(path.relative_to(ROOT)): None for path in ours if path.is_dir()}
    wrong, seen = [], 0
    for place, name in names_of_code(text):
        if place.endswith("NAME") or place == "Setup" or place.startswith("StudentStep"):
            continue
        found = [path for key, path in known.items() if f"/{key}".endswith(f"/{place.rstrip('/')}")]
        seen += len(found) > 0
        if not found or (name and not any(path and name in defined_in(path) for path in found)):
            wrong.append(f"{place} {name or ''}")
    assert seen > 60 and not wrong
    assert len(text.splitlines()) <= 120
