"""The diagram of accuracy over confidence shows the bins that were recorded, and nothing where they were not."""

import json
import re

import pytest

from megakd.reporting.page import page
from megakd.reporting.reliability import figures, points_of
from megakd.reporting.runs import read_runs
from tests.reporting import made
from tests.reporting.test_page import MADE, Document


def write(folder, *lines, evaluated=()):
    run = made.write(folder, [made.train_line(1), *lines])
    (run / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluated))
    return run


def test_a_bin_is_a_dot_at_its_mean_confidence_and_accuracy(tmp_path):
    last = made.calibrated(made.validation_line(10), sharp=2.0)
    runs = read_runs([write(tmp_path / "a", made.calibrated(made.validation_line(5)), last)])
    (figure,) = figures(runs)
    dots = re.findall(
        r'<path class="dots" d="M([0-9.]+),([0-9.]+)h0" style="stroke-width:([0-9.]+)"><title>(.*?)<', figure
    )
    assert [(float(x), float(y)) for x, y, _, _ in dots] == [
        (300.0, 850.0), (500.0, 733.3), (700.0, 650.0), (900.0, 600.0),
    ]  # fmt: skip
    assert dots[0][3] == "a: 30.0% sure, 15.0% right, 40 tokens"
    widths = [float(width) for _, _, width, _ in dots]
    assert widths == sorted(widths, reverse=True) and widths[0] > widths[-1]
    assert "mean distance 25.00% over 100 tokens" in figure, "of the last validation alone"


def test_validations_and_evaluations_have_a_diagram_each_of_the_runs_that_have_bins(tmp_path):
    a = write(tmp_path / "a", made.calibrated(made.validation_line(5)))
    b = write(tmp_path / "b", made.validation_line(5), evaluated=[made.calibrated({"ce": 3.0})])
    both = figures(read_runs([a, b]))
    assert ["last validation" in both[0], "last megakd evaluate" in both[1]] == [True, True]
    assert ["run-0" in text for text in both] == [True, False] and ["run-1" in text for text in both] == [False, True]
    document = Document(page(read_runs([a, b]), MADE))
    assert not document.wrong and len(document.all("b")) >= 2
    assert "accuracy over confidence" not in "".join(e[2] for e in document.all("p", class_="missing"))
    assert figures(read_runs([write(tmp_path / "c", made.validation_line(5))])) == []


@pytest.mark.parametrize(
    "value",
    [
        None, 3, [], {}, {"tokens": [1], "confidence": [0.5]}, {"tokens": [1], "confidence": [0.5], "right": [1, 2]},
        {"tokens": [1], "confidence": ["a"], "right": [1]}, {"tokens": [1], "confidence": [float("nan")], "right": [1]},
        {"tokens": [1], "confidence": [7.0], "right": [1]}, {"tokens": 1, "confidence": 1, "right": 1},
        {"tokens": [0, 0], "confidence": [0.0, 0.0], "right": [0, 0]},
    ],
)  # fmt: skip
def test_what_is_no_bins_is_not_drawn(value):
    assert points_of({"calibration": value}) == () and points_of({}) == ()
