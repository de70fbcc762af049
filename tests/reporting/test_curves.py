"""Where points come to stand, what becomes of many of them, ticks, labels, written numbers."""

import itertools
import math
import random
import re

import pytest

from megakd.reporting.curves import BUCKETS, Charts, short, spread, thin
from megakd.reporting.quantities import KNOWN, Quantity, duration, number, quantity, shown
from megakd.reporting.runs import read_runs
from megakd.reporting.scales import Scale, axis_ticks, even_steps, labels, log_steps, value_scale
from tests.reporting import made

PAIR = re.compile(r"(-?[\d.]+),(-?[\d.]+)")


def paths(chart, name, run, axis="step"):
    """`d` of the paths of one class of a run's curve."""
    box = chart.split(f'class="plot by-{axis}"')[1].split("</svg>")[0]
    group = re.search(rf'<g class="run-{run} [^"]*">(.*?)</g>', box).group(1)
    return re.findall(rf'<path class="{name}" d="([^"]*)"', group)


def ends_of(chart):
    """The lowest and the highest value of the vertical axis."""
    return [float(re.search(rf'data-{end}="([^"]*)"', chart).group(1)) for end in ("low", "high")]


def points(chart, run, axis="step"):
    """(x, value) of the points of a run's line, read back from its path and the chart's scale."""
    low, high = ends_of(chart)
    end = float(re.search(rf'data-axis="{axis}" data-end="([^"]*)"', chart).group(1))
    log = "data-log" in chart.split(">")[0]
    (path,) = paths(chart, "line", run, axis)
    found = []
    for x, y in PAIR.findall(path):
        up = 1 - float(y) / 1000
        found.append((float(x) / 1000 * end, low * (high / low) ** up if log else low + up * (high - low)))
    return found


@pytest.fixture
def runs(tmp_path):
    long, short = made.lines_of(23), made.lines_of(11)
    return read_runs([made.write(tmp_path / "long", long), made.write(tmp_path / "short", short)])


@pytest.mark.parametrize("key", ["loss", "kd", "lr", "peak_memory_bytes", "agreement"])
@pytest.mark.parametrize("axis", ["step", "tokens", "seconds"])
def test_a_curve_goes_through_its_values(runs, key, axis):
    chart = Charts(runs).chart("train", key)
    for i, run in enumerate(runs):
        lines = run.of("train")
        expected = list(zip(lines.axes[axis], [v * quantity(key).factor for v in lines.columns[key]], strict=True))
        drawn, (low, high) = points(chart, i, axis), ends_of(chart)
        tolerance = 0.5e-4 * (high - low) + 1e-5 * high  # half of the last digit of a coordinate, and of an end
        assert len(drawn) == len(expected)
        for (x, y), (at, value) in zip(drawn, expected, strict=True):
            assert x == pytest.approx(at, abs=0.51e-4 * runs[0].of("train").axes[axis][-1])
            assert y == pytest.approx(value, abs=tolerance)


def test_a_logarithmic_axis(tmp_path):
    lines = [made.train_line(step, grad_norm=10.0 ** (step / 3)) for step in range(1, 14)]
    chart = Charts(read_runs([made.write(tmp_path / "a", lines)])).chart("train", "grad_norm")
    assert "data-log" in chart and "<span>log</span>" in chart
    assert [y for _, y in points(chart, 0)] == pytest.approx([10.0 ** (step / 3) for step in range(1, 14)], rel=2e-3)


def test_not_finite_values_break_a_curve_and_are_marked(tmp_path):
    lines = [made.train_line(step) for step in range(1, 12)]
    lines[4]["ce"], lines[5]["ce"], lines[9]["ce"] = math.nan, math.inf, math.nan
    del lines[2]["ce"]
    chart = Charts(read_runs([made.write(tmp_path / "a", lines)])).chart("train", "ce")
    (line,) = paths(chart, "line", 0)
    assert [len(PAIR.findall(piece)) for piece in line.split("M")[1:]] == [3, 3, 1]
    assert line.endswith("h0"), "a point alone is a dot"
    assert chart.count("M454.5,0v45M545.5,0v45M909.1,0v45") == 3, "once for each axis: all steps are alike"
    assert "a: not finite at steps 5, 6, 10" in chart and "nan" not in chart and "inf" not in line


def test_a_metric_without_a_finite_value(tmp_path):
    lines = [made.train_line(step, kd=math.nan) for step in (1, 2)]
    chart = Charts(read_runs([made.write(tmp_path / "a", lines)])).chart("train", "kd")
    assert chart.count("no finite value") == 3 and "<svg" not in chart


def test_one_step_is_a_dot(tmp_path):
    chart = Charts(read_runs([made.write(tmp_path / "a", [made.train_line(1)])])).chart("train", "ce")
    assert paths(chart, "line", 0) == ["M1000.0,500.0h0"] and paths(chart, "dots", 0) == ["M1000.0,500.0h0"]


def test_an_axis_that_one_run_lacks(tmp_path):
    lines = made.lines_of(5)
    bare = [{key: value for key, value in line.items() if key != "tokens"} for line in lines]
    runs = read_runs([made.write(tmp_path / "a", lines), made.write(tmp_path / "b", bare)])
    box = Charts(runs).chart("train", "ce").split('class="plot by-tokens"')[1].split("</svg>")[0]
    assert "run-0" in box and "run-1" not in box
    assert "supervised tokens: not measured" in Charts(runs[1:]).chart("train", "ce")


def test_the_teacher_is_a_dotted_line_beside_the_held_out_cross_entropy(runs):
    chart = Charts(runs).chart("validation", "ce")
    assert chart.count(" reference") == 2 * 3 and "dotted: teacher" in chart
    assert float(re.search(r'data-low="([^"]*)"', chart).group(1)) < 2.875, "it is within the chart"


def test_many_points_become_their_means_and_extremes():
    draw = random.Random(3)
    xs = sorted(draw.uniform(0, 1000) for _ in range(7919))
    ys = [draw.gauss(0, 1) for _ in xs]
    path, width = thin(xs, ys, 1000.0), 1000 / BUCKETS
    assert len(path) == BUCKETS and path[0][0] == xs[0] and path[-1][0] == xs[-1]
    for i, (x, mean, low, high) in enumerate(path):
        part = [y for place, y in zip(xs, ys, strict=True) if i * width <= place < (i + 1) * width]
        assert i * width <= x < (i + 1) * width
        assert (mean, low, high) == (pytest.approx(sum(part) / len(part)), min(part), max(part))
    few = thin(xs[:599], ys[:599], 1000.0)
    assert few == [(x, y, y, y) for x, y in zip(xs[:599], ys[:599], strict=True)]


def test_a_band_is_drawn_where_points_share_a_column(tmp_path):
    lines = [made.train_line(step, ce=3.0 + step % 7) for step in range(1, 1201)]
    chart = Charts(read_runs([made.write(tmp_path / "a", lines)])).chart("train", "ce")
    assert len(paths(chart, "band", 0)) == 1 and paths(chart, "dots", 0) == []


def test_a_long_curve_that_begins_high_shows_what_comes_after(tmp_path):
    lines = [
        made.train_line(s, ce=3.0 + (6.0 if s < 10 else 0.5 / s), agreement=0.0 if s < 10 else 0.5)
        for s in range(1, 401)
    ]
    runs = read_runs([made.write(tmp_path / "a", lines)])
    chart = Charts(runs).chart("train", "ce")
    assert "begins above, at 9 nats" in chart and 2.99 < ends_of(chart)[0] < 3.0016 and 3.025 < ends_of(chart)[1] < 3.1
    assert points(chart, 0)[0][1] == pytest.approx(9.0, rel=1e-3), "drawn where it is, above the box"
    assert points(chart, 0)[-1][1] == pytest.approx(lines[-1]["ce"], rel=1e-4)
    assert "begins above" not in Charts(runs).chart("train", "agreement"), "that is to rise"
    few = read_runs([made.write(tmp_path / "b", lines[:150])])
    assert "begins above" not in Charts(few).chart("train", "ce")


def test_labels_do_not_overlap_and_stay_inside():
    assert spread([0.1, 0.5], 0.1, 0.9) == [0.1, 0.5]
    for tops in ([0.5] * 5, [0.88, 0.89, 0.9, 0.9], [0.0, 0.0, 0.9]):
        placed = spread(tops, 0.1, 0.9)
        assert all(b - a >= 0.1 - 1e-9 for a, b in itertools.pairwise(placed)) and placed[-1] <= 0.9


def test_long_names_keep_both_ends():
    assert short("x" * 22) == "x" * 22
    assert short("forward_kl_of_a_very_long_name_k16") == "forward_kl_…g_name_k16" and len(short("y" * 99)) <= 22


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 23), (2.1, 2.74), (-0.3, 0.2), (0, 10_000), (0, 3e38), (1e-7, 1.02e-7), (0, 2.5e-4)]
)
def test_ticks_are_round_different_and_inside(low, high):
    values = even_steps(low, high, 6)
    assert 2 <= len(values) <= 8 and all(low - 1e-9 * high <= v <= high * (1 + 1e-9) for v in values)
    texts = labels(values)
    assert len(set(texts)) == len(texts)
    assert all(len(text) <= 9 for text in texts)


@pytest.mark.parametrize(("low", "high"), [(0.3, 40), (2e-9, 3e7), (1.5, 160), (7, 2000)])
def test_logarithmic_ticks(low, high):
    values = log_steps(low, high, 6)
    assert 2 <= len(values) <= 10 and all(low <= v <= high for v in values)


def test_tick_texts():
    assert labels([0, 2000, 4000, 10_000]) == ["0", "2k", "4k", "10k"] and labels([0, 0.5, 1]) == ["0", "0.5", "1"]
    assert labels([0, 1e-4, 2.5e-4]) == ["0", "1e-4", "2.5e-4"] and labels([0, 5e8, 1e9]) == ["0", "0.5B", "1B"]
    assert [axis_ticks("seconds", end).unit for end in (90, 600, 9000, 900_000)] == ["s", "min", "h", "d"]
    assert axis_ticks("seconds", 21_600).places[-1] == (pytest.approx(1.0), "6")


def test_scales():
    flat = value_scale([3.0, 3.0 + 1e-9], Quantity("x"))
    assert flat.high - flat.low >= 0.03, "rounding is not blown up"
    assert value_scale([], Quantity("x")).high > 0 and value_scale([0.0, 0.0], Quantity("x")).place(0.0) == 0.5
    assert value_scale([1.0, 2.0], KNOWN["tokens_per_second"]).low == 0.0
    assert value_scale([0.0, 500.0], KNOWN["kd"]).log is False and value_scale([0.1, 50.0], KNOWN["kd"]).log is True
    assert Scale(1.0, 100.0, log=True).place(10.0) == pytest.approx(0.5)


def test_written_numbers():
    texts = {0: "0", 4.46789: "4.468", 12345.6: "12,346", 1234567: "1.235 M", 2.561e9: "2.561 B", 2.5e-4: "2.5e-4"}
    assert {value: number(value) for value in texts} == texts and number(-0.00012) == "-1.2e-4"
    assert number(math.nan) == "nan" and number(math.inf) == "inf"
    assert shown("agreement", 0.59375) == "59.38 %" and shown("peak_memory_bytes", 2.5e9) == "2.5 GB"
    assert shown("kd", None) == "not measured" and shown("kd", 0.0) == "0 nats"
    assert [duration(s) for s in (42, 750, 12_240, 200_000)] == ["42 s", "12.5 min", "3.4 h", "2.31 d"]
    assert quantity("save_seconds").unit == "s" and quantity("host_bytes").factor == 1e-9
    assert quantity("coder/kd").title == "divergence from the teacher: coder" and quantity("coder/kd").log_from == 100
