"""Configuration text in and out: YAML 1.2's scalars, so that 3e-4 is a number and `no` is a word.

PyYAML reads YAML 1.1, in which 3e-4 is text, `no` and `off` are false, 010 is eight and 1:30 is ninety. Reader and
writer here share one table of plain scalars (YAML 1.2 core schema), so what is written reads back the same. A key given
twice in one mapping is an error.
"""

import re
from typing import Any

import yaml

from megakd.errors import ConfigError, MegakdError
from megakd.limits import check_limit, excess, limit

PLAIN_SCALARS = {
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", "~nN\0"),
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "tag:yaml.org,2002:merge": (r"<<", "<"),
}


def _resolvers() -> dict[str, list[tuple[str, re.Pattern]]]:
    table: dict[str, list[tuple[str, re.Pattern]]] = {}
    for tag, (pattern, first_characters) in PLAIN_SCALARS.items():
        for character in first_characters:
            table.setdefault("" if character == "\0" else character, []).append((tag, re.compile(rf"(?:{pattern})\Z")))
    return table


class BoundedLoader(yaml.SafeLoader):
    """PyYAML's safe loader (YAML 1.1) that refuses a document which its aliases make larger than YAML_NODES."""

    def get_single_node(self):
        node = super().get_single_node()
        if node is not None and (words := excess("YAML_NODES", _written_out(node, limit("YAML_NODES")))):
            raise yaml.constructor.ConstructorError(None, None, words, node.start_mark)
        return node


def _written_out(root: yaml.Node, most: int) -> int:
    """Nodes of a document with every alias written out; more than `most` (not how many more) if it is too large."""
    count, waiting = 0, [root]
    while waiting and count <= most:
        node = waiting.pop()
        count += 1
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            waiting += [part for pair in node.value for part in pair]
    return count + len(waiting)


def bounded_yaml(text: str, loader: type[BoundedLoader], where, error: type[MegakdError]) -> Any:
    """One YAML document within YAML_BYTES and YAML_NODES.

    Args:
        where, error: whom and with what to refuse.

    Raises:
        error: it is too large.
        yaml.YAMLError, ValueError: it is no YAML.
    """
    check_limit("YAML_BYTES", len(text.encode("utf-8", "surrogatepass")), where, error)
    try:
        return yaml.load(text, Loader=loader)
    except RecursionError:
        raise ValueError("its brackets or indentation are nested too deep") from None


class _Loader(BoundedLoader):
    yaml_implicit_resolvers = _resolvers()

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            if isinstance(key.value, str):
                seen.add(key.value)
        return node


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _resolvers()


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def parse_yaml(text: str, where: str) -> Any:
    """Reads one YAML document.

    Args:
        text: the document.
        where: what it is called in an error: a file, or an override.

    Raises:
        ConfigError: not YAML, several documents, or a key given twice; with line and column.
    """
    try:
        return bounded_yaml(text, _Loader, where, ConfigError)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error)
        raise ConfigError(
            f"{where}{place}: not valid YAML: {reason}",
            hint="check indentation, and quote text that contains `: `, `#`, or starts with `[`, `{`, `*` or `&`",
        ) from error


def format_yaml(values: dict[str, Any]) -> str:
    """Writes one YAML document, keys in the order of the dictionary; `parse_yaml` gives the same values back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
