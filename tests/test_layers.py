"""Imports point down the stack, and each heavy library has one home."""

import ast
import pathlib
import textwrap

import pytest

LAYERS = [
    "errors",
    "config ranks targets megatron_on_cpu",
    "kernels",
    "cache",
    "losses data",
    "models",
    "checkpoints",
    "training",
    "runs",
    "cli",
    "__main__",
]
DEPTH = {name: depth for depth, names in enumerate(LAYERS) for name in names.split()}
HOMES = {
    "megatron": {"megatron_on_cpu", "models", "checkpoints", "training", "data"},
    "triton": {"kernels"},
    "transformers": {"data", "checkpoints", "megatron_on_cpu"},
    "tests": set(),
    "tools": set(),
}
ROOT = pathlib.Path(__file__).parent.parent / "megakd"


def imported(source: str):
    """Dotted names that a module imports at any depth of its code; `from megakd import x` counts as megakd.x."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield "." * node.level
        elif isinstance(node, ast.ImportFrom):
            yield from ([f"megakd.{a.name}" for a in node.names] if node.module == "megakd" else [node.module])


def broken_rules(here: str, source: str):
    """What a module of the part `here` (`kernels`, `cli`) imports against the rules."""
    if here not in DEPTH:
        yield f"{here} has no layer; give it one in this test and in the design"
        return
    for name in imported(source):
        top, _, rest = name.partition(".")
        there = rest.partition(".")[0]
        if not top:
            yield "relative import; write the name in full"
        elif top == "megakd" and there in DEPTH and there != here and DEPTH[there] >= DEPTH[here]:
            yield f"{name} is not below {here}"
        elif here not in HOMES.get(top, {here}):
            yield f"{name} belongs in {sorted(HOMES[top])}"


def test_imports_point_down():
    wrong, parts = [], set()
    for path in sorted(ROOT.rglob("*.py")):
        here = path.relative_to(ROOT).with_suffix("").parts[0]
        if here != "__init__":
            parts.add(here)
            wrong += [
                f"{path.relative_to(ROOT.parent)}: {rule}" for rule in broken_rules(here, path.read_text("utf-8"))
            ]
    assert {"config", "errors", "cli"} <= parts, "the package was not found"
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("here", "source", "rules"),
    [
        ("kernels", "import megakd.targets\nfrom megakd.errors import MegakdError", 0),
        ("kernels", "from megakd.kernels.vocab import VocabShard\nimport torch, triton.language", 0),
        ("kernels", "from megakd.losses import objective", 1),
        ("kernels", "from megakd import losses, targets", 1),
        ("data", "def f():\n    import megakd.losses", 1),
        ("config", "import megakd.ranks", 1),
        ("cli", "from megakd import __version__, errors", 0),
        ("runs", "import megatron.core", 1),
        ("runs", "def f():\n    from megatron.core import parallel_state", 1),
        ("models", "import megatron.core, triton", 1),
        ("training", "from transformers import AutoTokenizer", 1),
        ("data", "import transformers, megatron.core.datasets", 0),
        ("data", "from . import order", 1),
        ("losses", "from tests.ranks import run_ranks", 1),
        ("utils", "", 1),
    ],
)
def test_the_rules_catch(here, source, rules):
    assert len(list(broken_rules(here, textwrap.dedent(source)))) == rules
