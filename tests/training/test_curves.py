"""Twenty steps of every kind of training give the numbers that are written down."""

import copy
import json

import pytest

from tests.training import curves

KNOWN = json.loads(curves.FILE.read_text())


@pytest.mark.parametrize("name", curves.VARIANTS)
def test_the_curve_is_what_it_was(name):
    assert curves.difference(curves.curve(name), KNOWN[name]) < curves.TOLERANCE


def test_layouts_and_sources_that_must_agree_do():
    for name in ("tp 2", "tp 2, sequence parallel", "pp 2", "dp 2", "cached"):
        assert curves.difference(KNOWN[name], KNOWN["tp 1"]) < curves.TOLERANCE, name


def test_a_changed_number_is_seen():
    changed = copy.deepcopy(KNOWN["tp 1"])
    changed[7]["kd"] *= 1 + 2 * curves.TOLERANCE
    assert curves.difference(changed, KNOWN["tp 1"]) > curves.TOLERANCE
    assert KNOWN.keys() == curves.VARIANTS.keys()
