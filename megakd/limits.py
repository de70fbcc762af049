"""How much of a file from a stranger is taken before it is refused: limits by name, in one table.

Each is raised (or lowered) by an environment variable: the limit LAYERS by MEGAKD_LIMIT_LAYERS. docs/security.md
lists them.
"""

import json
import os
import pathlib
import re
from collections.abc import Iterator

from megakd.errors import ConfigError, MegakdError

LIMITS = {  # name -> (default, what it counts)
    "YAML_BYTES": (1 << 20, "bytes of YAML"),
    "YAML_NODES": (100_000, "YAML nodes, aliases written out"),
    "JSON_BYTES": (1 << 29, "bytes of JSON"),
    "JSON_DEPTH": (100, "levels of JSON"),
    "ANSWER_BYTES": (1 << 28, "bytes of an answer of a server"),
    "HEADER_BYTES": (100_000_000, "bytes of a safetensors header"),
    "PICKLE_BYTES": (1 << 30, "bytes of a pickle that describes tensors"),
    "ARCHIVE_MEMBERS": (100_000, "members of an archive"),
    "ARCHIVE_RATIO": (20, "bytes unpacked for one byte of an archive"),
    "LAYERS": (10_000, "layers"),
    "EXPERTS": (1_000_000, "experts in all layers"),
    "TEMPLATE_BYTES": (1 << 20, "bytes of a chat template"),
    "TEMPLATE_SECONDS": (10, "seconds for a conversation in a chat template"),
    "TEMPLATE_CHARACTERS": (10_000_000, "characters made by a chat template"),
}
PREFIX = "MEGAKD_LIMIT_"
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)


def limit(name: str) -> int:
    """The limit that holds.

    Raises:
        ConfigError: its environment variable is no positive integer.
    """
    default, what = LIMITS[name]
    said = os.environ.get(PREFIX + name)
    if said is None:
        return default
    if not re.fullmatch(r"[1-9][0-9]{0,17}", said):
        raise ConfigError(
            f"{PREFIX}{name} is {said!r}, expected a number of {what}", hint=f"unset it for the default, {default}"
        )
    return int(said)


def excess(name: str, value: int) -> str | None:
    """None if a value keeps within its limit; else the words for it."""
    if value <= limit(name):
        return None
    return f"{value:,} {LIMITS[name][1]} exceed the limit {name} = {limit(name):,}"


def advice(name: str) -> str:
    return f"no real file comes near it; if you trust this one, set {PREFIX}{name} to a larger number"


def check_limit(name: str, value: int, where, error: type[MegakdError]) -> None:
    """Raises `error`, which names `where`, the limit and how to raise it, if the value exceeds the limit."""
    if words := excess(name, value):
        raise error(f"{where}: {words}", hint=advice(name))


def parse_json(text: str, where, error: type[MegakdError]):
    """The value of a JSON text whose size and depth keep within JSON_BYTES and JSON_DEPTH.

    Raises:
        error: they do not.
        ValueError: it is no JSON.
    """
    check_limit("JSON_BYTES", len(text), where, error)
    if text.count("[") + text.count("{") > limit("JSON_DEPTH"):
        check_limit("JSON_DEPTH", max(_depths(text), default=0), where, error)
    return json.loads(text)


def _depths(text: str) -> Iterator[int]:
    depth = 0
    for token in _BRACKETS.finditer(text):
        if (first := token[0][0]) != '"':
            depth += 1 if first in "[{" else -1
            yield depth


def read_json(path: pathlib.Path, error: type[MegakdError]):
    """As `parse_json`, of a file.

    Raises:
        error, ValueError: as parse_json.
        OSError: it cannot be read.
    """
    check_limit("JSON_BYTES", path.stat().st_size, path, error)
    return parse_json(path.read_text(encoding="utf-8"), path, error)
