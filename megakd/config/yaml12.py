"""Configuration text in and out: YAML 1.2's scalars, so that 3e-4 is a number and `no` is a word.

PyYAML reads YAML 1.1, in which 3e-4 is text, `no` and `off` are false, 010 is eight and 1:30 is ninety. Reader and
writer here share one table of plain scalars (YAML 1.2 core schema), so what is written reads back the same. A key given
twice in one mapping is an error.
"""

import re
from typing import Any

import yaml

from megakd.errors import ConfigError

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


class _Loader(yaml.SafeLoader):
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
        return yaml.load(text, Loader=_Loader)
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
