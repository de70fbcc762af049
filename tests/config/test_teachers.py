"""The teachers section: every source of data has one teacher, and what one teacher would do is said of none."""

import pytest

from megakd.config import Config
from megakd.errors import ConfigError

A = {"name": "a", "checkpoint": "A", "data": ["one", "two"]}
B = {"name": "b", "checkpoint": "B", "data": ["three"], "weight": 2.5}
DATA = {"data.train": [0.5, "one", 0.5, "three"], "data.validation": ["two"]}


def test_what_holds_for_all_teachers_stands_in_the_teacher_section(build, tmp_path):
    config = build({"teachers": [A, B], **DATA})
    assert config.teacher.checkpoint is None and not config.teacher.offload
    assert [(teacher.name, teacher.weight) for teacher in config.teachers] == [("a", 1.0), ("b", 2.5)]
    config.save(tmp_path / "config.yaml")
    assert Config.load(tmp_path / "config.yaml") == config
    assert config.flat()["teachers"][1] == {"name": "b", "checkpoint": "B", "data": ["three"], "weight": 2.5}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"teachers": [A, B | {"name": "a"}]}, "teachers: the names a, a; expected each once"),
        ({"teachers": [A, B | {"name": "b/c"}]}, "teachers[1].name: 'b/c'; expected letters"),
        ({"teachers": [A, B | {"data": []}]}, "teachers[1].data: []; expected at least one source"),
        ({"teachers": [A, B | {"wieght": 1.0}]}, "teachers[1].wieght: unknown key; did you mean teachers.weight?"),
        ({"teachers": [A, B | {"weight": -1.0}]}, "teachers[1].weight: -1.0, expected number >= 0"),
        ({"teachers": [A, {"name": "b", "data": ["three"]}]}, "teachers[1].checkpoint: missing, expected"),
        ({"teachers": [A]}, "data.train: three has no teacher; expected it in the data of exactly one of a"),
        ({"teachers": [A, B | {"data": ["three", "two"]}]}, "data.validation: two has the teachers a and b; expected"),
        ({"teachers": [A, B | {"data": ["three", "tree"]}]}, "teachers[1].data: 'tree' is in neither data.train nor "
         "data.validation; did you mean three?"),
        ({"teachers": [A, B], "teacher.checkpoint": "C"}, "teacher.checkpoint: C, but teachers are given"),
        ({"teachers": [A, B], "teacher.cache": "C"}, "teacher.cache: C, but teachers are given"),
        ({"teachers": [A, B], "features": {"student_layers": [1], "teacher_layers": [1]}}, "features: given with"),
        ({"teacher.allow_weak": True}, "teacher.checkpoint: neither checkpoint nor cache is given"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(build, changes, problem):
    with pytest.raises(ConfigError) as caught:
        build(DATA | changes)
    assert problem in str(caught.value)
