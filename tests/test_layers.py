"""Imports point down the stack, between packages and between files; each heavy library has one home."""

import ast
import pathlib
import re
import textwrap
from collections.abc import Iterator, Mapping

import pytest

# Packages from the ground up; those on one line do not import each other.
LAYERS = [
    "errors",
    "digests divergences file limits ownership paths processes progress publish",
    "upload",
    "config ranks stopped targets megatron_on_cpu",
    "kernels planning",
    "cache steps",
    "losses data",
    "models",
    "checkpoints",
    "converters teachers",
    "assembly",
    "generation",
    "rollouts",
    "training recording reporting pruning",
    "runs",
    "cli",
    "__main__",
]
DEPTH = {name: depth for depth, names in enumerate(LAYERS) for name in names.split()}
HOMES = {
    "megatron": {"megatron_on_cpu", "models", "checkpoints", "converters", "training", "data"},
    "triton": {"kernels"},
    "transformers": {"data", "converters", "megatron_on_cpu"},
    "tqdm": {"progress"},
    "lm_eval": {"generation"},
    "tests": set(),
    "tools": set(),
}
PACKAGE = pathlib.Path(__file__).parent.parent / "megakd"
MODULE_NAME = re.compile(r"megakd(\.\w+)+")


def modules(package: pathlib.Path) -> dict[str, str]:
    """Dotted name -> source of every file; a package's `__init__.py` goes by the package's name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text("utf-8")
    return found


def imported(source: str, known: Mapping[str, str] = {}) -> Iterator[str]:
    """Dotted names that a module imports at any depth of its code; a deferred import counts as any other.

    Args:
        source: of the module.
        known: names of modules; `from megakd.cache import row` counts as megakd.cache.row where that is one, and a
            text that is the name of one (`import_module("megakd.cache.row")`, a table of verbs) as its import.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield "." * node.level
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if node.module == "megakd" or full in known else node.module
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value.partition(":")[0]
            if MODULE_NAME.fullmatch(name) and name in known:
                yield name


def broken_rules(here: str, source: str, known: Mapping[str, str] = {}) -> Iterator[str]:
    """What a module of the part `here` (`kernels`, `cli`) imports against the rules."""
    if here not in DEPTH:
        yield f"{here} has no layer; give it one in this test and in docs/architecture.md"
        return
    for name in imported(source, known):
        top, _, rest = name.partition(".")
        there = rest.partition(".")[0]
        if not top:
            yield "relative import; write the name in full"
        elif top == "megakd" and there in DEPTH and there != here and DEPTH[there] >= DEPTH[here]:
            yield f"{name} is not below {here}"
        elif here not in HOMES.get(top, {here}):
            yield f"{name} belongs in {sorted(HOMES[top])}"


def circle(sources: Mapping[str, str]) -> list[str]:
    """Modules that import each other in a ring, in order; empty when there is none."""
    edges = {name: sorted(({*imported(source, sources)} & sources.keys()) - {name}) for name, source in sources.items()}
    done: set[str] = set()

    def search(name: str, above: tuple[str, ...]) -> list[str]:
        if name in above:
            return [*above[above.index(name) :], name]
        if name not in done:
            for other in edges[name]:
                if found := search(other, (*above, name)):
                    return found
            done.add(name)
        return []

    return next((found for name in edges if (found := search(name, ()))), [])


def test_imports_point_down():
    known, wrong = modules(PACKAGE), []
    for name, source in known.items():
        if name != "megakd":
            wrong += [f"{name}: {rule}" for rule in broken_rules(name.split(".")[1], source, known)]
    assert {"megakd.config.config", "megakd.cli"} <= known.keys(), "the package was not found"
    assert not wrong, "\n".join(wrong)


def test_every_layer_is_there():
    parts = {name.split(".")[1] for name in modules(PACKAGE) if "." in name}
    assert parts == DEPTH.keys()


def test_no_circle_between_files():
    assert not circle(modules(PACKAGE))


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
        ("training", "from megakd.recording.record import record", 1),
        ("checkpoints", "def f():\n    from megakd.converters.direct import converted", 1),
        ("checkpoints", "import transformers", 1),
        ("teachers", "from megakd.converters import direct", 1),
        ("data", "import transformers, megatron.core.datasets", 0),
        ("data", "from . import order", 1),
        ("losses", "from tests.ranks import run_ranks", 1),
        ("utils", "", 1),
    ],
)
def test_the_rules_catch(here, source, rules):
    assert len(list(broken_rules(here, textwrap.dedent(source)))) == rules


@pytest.mark.parametrize(
    ("planted", "ring"),
    [
        ({"megakd.config.loss": "from megakd.config.config import Config"}, ["config.config", "config.loss"]),
        ({"megakd.cache.row": "def f():\n    from megakd.cache import reader"}, ["cache.reader", "cache.row"]),
        ({"megakd.ranks.launch": "from megakd.ranks import Ranks"}, ["ranks", "ranks.launch"]),
        (
            {"megakd.errors": "import importlib\nimportlib.import_module('megakd.cli')"},
            ["cli", "errors"],
        ),
    ],
)
def test_a_planted_circle_is_found(planted, ring):
    found = circle(modules(PACKAGE) | planted)
    assert {f"megakd.{name}" for name in ring} <= set(found) and found[0] == found[-1]


def test_a_planted_upward_import_is_found():
    known = modules(PACKAGE)
    planted = known["megakd.kernels.vocab"] + "\ndef late():\n    from megakd.training import loop\n"
    assert list(broken_rules("kernels", planted, known)) == ["megakd.training.loop is not below kernels"]
