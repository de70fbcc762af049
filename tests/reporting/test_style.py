"""The colours of runs are told apart by everybody, and seen on the page's background."""

import itertools
import re

import numpy as np
import pytest

from megakd.reporting.curves import COLORS
from megakd.reporting.style import STYLE

# Linear RGB as it is seen without one kind of cone. Source: Machado, Oliveira and Fernandes 2009, severity 1.
VISIONS = {
    "all": np.eye(3),
    "no long": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no medium": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "no short": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
LEAST_DISTANCE, LEAST_CONTRAST = 15.0, 3.0  # of CIELAB 1976; WCAG 2.1 on graphics


def linear(color):
    value = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    x, y, z = np.cbrt(XYZ @ np.clip(rgb, 0, 1) / [0.9505, 1.0, 1.089])  # none is so dark that it is linear
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def palettes():
    found = re.findall(r"--c(\d):(#[0-9a-f]{6})", STYLE)
    return [dict(found[:COLORS]), dict(found[COLORS:])]


@pytest.mark.parametrize(("dark", "background"), [(False, "#ffffff"), (True, "#14171b")])
def test_colours(dark, background):
    colors = palettes()[dark]
    assert sorted(colors) == list("012345")[:COLORS] and f"--back:{background[:4] if not dark else background}" in STYLE
    lightness = XYZ[1] @ linear(background)
    for color in colors.values():
        low, high = sorted((lightness, XYZ[1] @ linear(color)))
        assert (high + 0.05) / (low + 0.05) >= LEAST_CONTRAST, color
    for vision, matrix in VISIONS.items():
        for one, other in itertools.combinations(colors.values(), 2):
            seen = [lab(np.array(matrix) @ linear(color)) for color in (one, other)]
            assert np.linalg.norm(seen[0] - seen[1]) >= LEAST_DISTANCE, (vision, one, other)
