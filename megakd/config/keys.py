"""The keys of the configuration as a flat list: dotted name, what is expected, default, documentation."""

import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic.fields import FieldInfo

from megakd.config.section import Named, Section

NAMES = {int: "integer", float: "number", str: "text", bool: "true or false"}
RELATIONS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


@dataclass(frozen=True)
class Key:
    """One dotted key.

    Attributes:
        name: dotted, from the root of the YAML.
        section: the class of the section it stands in.
        expected: type and range in words.
        required: no default.
        default: as in Python; None stands for null.
        doc: meaning and unit, on one line.
    """

    name: str
    section: type[Section]
    expected: str
    required: bool
    default: Any
    doc: str


def section_of(annotation: Any) -> type[Section] | None:
    """The section class behind a field's annotation (`Model`, `Model | None`), or None for a plain value."""
    for arm in (annotation, *typing.get_args(annotation)):
        if isinstance(arm, type) and issubclass(arm, Section):
            return arm
    return None


def iter_keys(section: type[Section], prefix: str = "") -> Iterator[Key]:
    """All keys below `section` in the order of the schema, sections entered where they stand."""
    for name, field in section.model_fields.items():
        if inner := section_of(field.annotation):
            yield from iter_keys(inner, f"{prefix}{name}.")
        else:
            doc = " ".join((field.description or "").split())
            yield Key(prefix + name, section, expected(field), field.is_required(), field.get_default(), doc)


def expected(field: FieldInfo) -> str:
    """What a field takes, in words: `integer >= 1 or null`, `auto, cuda or cpu`, `section`."""
    return _describe(field.annotation, field.metadata)


def _describe(annotation: Any, metadata: list[Any]) -> str:
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        inner, *more = typing.get_args(annotation)
        return _describe(inner, [*metadata, *more])
    if origin in (typing.Union, types.UnionType):
        arms = [arm for arm in typing.get_args(annotation) if arm is not type(None)]
        words = " or ".join(_describe(arm, metadata) for arm in arms)
        return f"{words} or null" if len(arms) < len(typing.get_args(annotation)) else words
    if origin is Literal:
        *first, last = typing.get_args(annotation)
        return f"{', '.join(first)} or {last}" if first else last
    if origin is list:
        inner = _describe(typing.get_args(annotation)[0], [])
        return f"list of ({inner})" if " or " in inner else f"list of {inner}"
    if origin is dict:
        return "any value for each key" if typing.get_args(annotation)[1] is Any else "text for each key"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    if named := next((item.words for item in _flattened(metadata) if isinstance(item, Named)), None):
        return named
    bounds = " and ".join(_bounds(metadata))
    if any(getattr(item, "min_length", None) for item in _flattened(metadata)):
        return f"non-empty {NAMES[annotation]}"
    return f"{NAMES[annotation]} {bounds}".rstrip()


def _bounds(metadata: list[Any]) -> Iterator[str]:
    for item in _flattened(metadata):
        for name, sign in RELATIONS.items():
            if (bound := getattr(item, name, None)) is not None:
                yield f"{sign} {bound}"


def _flattened(metadata: list[Any]) -> Iterator[Any]:
    for item in metadata:
        yield from item.metadata if isinstance(item, FieldInfo) else [item]
