"""The teachers section: several live teachers, each for its own sources of data."""

import difflib
import re
from collections.abc import Iterator

from megakd.config.paths import LocalPath
from megakd.config.section import NotNegative, Section, Text


class NamedTeacher(Section):
    """Several teachers that run, a list: each teaches its own sources of data; the teacher section holds for all"""

    name: Text
    """What logs and metrics call it: `NAME/kd` is the divergence from this teacher, over the tokens it teaches."""
    checkpoint: LocalPath
    """As teacher.checkpoint."""
    data: list[LocalPath]
    """The sources that it teaches, as they are written in data.train and data.validation. Each has one teacher."""
    weight: NotNegative = 1.0
    """Factor of the divergence from it, beside loss.kd_weight: the objective stays one sum over the supervised tokens
    of the global batch."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", self.name):
            yield "name", f"{self.name!r}; expected letters, digits, _, . and -, for it is a part of metrics' names"
        if not self.data:
            yield "data", "[]; expected at least one source"


def paths_of(source) -> list[str]:
    """The paths in data.train or data.validation, without weights."""
    items = source if isinstance(source, list) else [source] if source else []
    return [item for item in items if isinstance(item, str)]


def teachers_problems(teachers: list[NamedTeacher], sources: dict[str, list[str]]) -> Iterator[tuple[str, str]]:
    """Yields (dotted key, what is wrong).

    Args:
        sources: the paths of data.train and data.validation, by key.
    """
    names = [teacher.name for teacher in teachers]
    if len(set(names)) < len(names):
        yield "teachers", f"the names {', '.join(names)}; expected each once"
    known = [path for paths in sources.values() for path in paths]
    for number, teacher in enumerate(teachers):
        for path in teacher.data:
            if path not in known:
                near = difflib.get_close_matches(path, known, n=1)
                meant = f"; did you mean {near[0]}?" if near else ""
                yield f"teachers[{number}].data", f"{path!r} is in neither data.train nor data.validation{meant}"
    for key, paths in sources.items():
        for path in dict.fromkeys(paths):
            taught_by = [teacher.name for teacher in teachers if path in teacher.data]
            if len(taught_by) != 1:
                whose = "no teacher" if not taught_by else f"the teachers {' and '.join(taught_by)}"
                yield key, f"{path} has {whose}; expected it in the data of exactly one of {', '.join(names)}"
