"""Dotted overrides from the command line: `train.steps=20`, `student.model.tie_embeddings=false`, `data.train=null`."""

from typing import Any

from megakd.config.yaml12 import parse_yaml
from megakd.errors import ConfigError


def apply_overrides(values: dict[str, Any], overrides: list[str]) -> list[str]:
    """Writes `key=value` pairs into nested dictionaries; a section that is absent or null is made.

    Args:
        values: the YAML as read; changed in place.
        overrides: `dotted.key=value` each, the value in YAML; of a key given twice the last one counts.

    Returns:
        The dotted keys that were set.

    Raises:
        ConfigError: no `=`, an empty part in the key, a value that is not YAML, or a key below a plain value.
    """
    keys = []
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.split(".")
        if not equals or not all(parts):
            raise ConfigError(
                f"command line: `{override}` is not an override of the form section.key=value",
                hint="the config file comes first, overrides follow it, such as `train.steps=20`; quote blanks",
            )
        _set(values, parts, parse_yaml(text, f"command line, {key}"))
        keys.append(key)
    return keys


def _set(values: dict[str, Any], parts: list[str], value: Any) -> None:
    for depth, part in enumerate(parts[:-1], start=1):
        if values.get(part) is None:
            values[part] = {}
        values = values[part]
        if not isinstance(values, dict):
            section = ".".join(parts[:depth])
            raise ConfigError(
                f"command line: {'.'.join(parts)} cannot be set, {section} is {values!r} and not a section",
                hint=f"set {section} itself, or make it a section in the file",
            )
    values[parts[-1]] = value
