"""The configuration's keys as text for people: what `megakd train --help` prints, made from the schema itself."""

import textwrap

from megakd.config.config import Config
from megakd.config.keys import Key, iter_keys, section_of
from megakd.config.problems import shown

LEAST_WIDTH = 60


def section_summaries() -> dict[str, str]:
    """Section name -> what it is about, in the order of the schema."""
    summaries = {}
    for name, field in Config.model_fields.items():
        summaries[name] = section_of(field.annotation).__doc__
    return summaries


def format_reference(width: int = 100) -> str:
    """Every key with type, default and meaning, grouped by section.

    Args:
        width: columns of the terminal; at least LEAST_WIDTH are used.
    """
    width = max(width, LEAST_WIDTH)
    groups: dict[str, list[Key]] = {}
    for key in iter_keys(Config):
        groups.setdefault(key.name.rpartition(".")[0], []).append(key)
    return "\n".join(line for name, keys in groups.items() for line in _format_group(name, keys, width))


def _format_group(name: str, keys: list[Key], width: int) -> list[str]:
    lines = textwrap.wrap(f"{name}: {keys[0].section.__doc__}", width, subsequent_indent="    ")
    defaults = [_default(key) for key in keys]
    widths = max(len(key.name) for key in keys), max(map(len, defaults))
    for key, default in zip(keys, defaults, strict=True):
        named = f"  {key.name:<{widths[0]}}  {default:<{widths[1]}}  "
        lines += textwrap.wrap(
            key.expected, width, initial_indent=named, subsequent_indent=" " * min(len(named), width // 2)
        )
        lines += textwrap.wrap(key.doc, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return [*lines, ""]


def _default(key: Key) -> str:
    if key.required:
        return "required"
    plain = isinstance(key.default, str) and key.default.isprintable()
    return f"= {key.default if plain else shown(key.default)}"
