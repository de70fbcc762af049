"""The page as a document: whole, self-contained, escaped, with the numbers of metrics.jsonl."""

import datetime
import html.parser
import itertools
import json
import math
import re

import pytest

from megakd.reporting import tables
from megakd.reporting.markup import VOID, Markup, join, tag
from megakd.reporting.page import ALONE, MOST_ROWS, page
from megakd.reporting.runs import read_runs
from tests.reporting import made

MADE = datetime.datetime(2026, 11, 27, 23, 30)
NASTY = '<script>alert(1)</script>&"quoted" <b>'
OF_THE_PAGE = {"html", "head", "body"}


class Document(html.parser.HTMLParser):
    """Elements in order with their attributes and text, and every way in which they are not nested.

    Attributes:
        elements: [tag, attributes, text within it].
    """

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.wrong = [], [], []
        self.feed(text)
        self.close()
        self.wrong += [f"<{name}> is never closed" for name, *_ in self.open]

    def handle_starttag(self, name, attributes):
        element = [name, dict(attributes), ""]
        self.elements.append(element)
        if (name not in VOID and name != "path") or name == "path":
            self.open.append(element)

    def handle_endtag(self, name):
        if not self.open or self.open[-1][0] != name:
            self.wrong.append(f"</{name}> within {[element[0] for element in self.open]}")
        else:
            self.open.pop()

    def handle_data(self, text):
        for element in self.open:
            element[2] += text

    def all(self, name, **attributes):
        return [
            element
            for element in self.elements
            if element[0] == name and all(element[1].get(key.rstrip("_")) == value for key, value in attributes.items())
        ]


def rows(markup):
    """Cells of the rows of a table, as text."""
    found = []
    for row in re.findall(r"<tr>(.*?)</tr>", markup):
        found.append([re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)])
    return found


@pytest.fixture
def runs(tmp_path):
    a = made.write(tmp_path / "kd", made.lines_of(23))
    alone = [
        {key: v for key, v in line.items() if key not in ("kd", "agreement", "teacher_ce", "teacher_seconds")}
        for line in made.lines_of(11)
    ]
    b = made.write(tmp_path / "alone", alone, teacher=None, loss=None)
    return read_runs([a, b])


def test_the_document_is_whole_and_asks_nothing_of_a_network(runs):
    text = page(runs, MADE)
    document = Document(text)
    assert text.startswith("<!doctype html>\n") and not document.wrong
    assert {element[0] for element in document.elements} >= OF_THE_PAGE
    ids = [element[1]["id"] for element in document.elements if "id" in element[1]]
    assert len(ids) == len(set(ids))
    for element in document.elements:
        assert element[0] not in ("link", "img", "iframe", "object", "base", "a")
        assert not {"src", "href", "srcset", "action", "data"} & element[1].keys(), element[:2]
    assert not re.search(r"url\(|@import|https?:|\bfetch\(|XMLHttpRequest", text)
    assert [e[1]["content"] for e in document.all("meta") if "http-equiv" in e[1]] == [ALONE]
    assert {label[1]["for"] for label in document.all("label")} == set(ids) - {"tip", "data"}


def test_every_section_is_there_and_says_what_was_not_measured(runs):
    document = Document(page(runs[1:], MADE))
    titles = [element[2] for element in document.all("h2")]
    assert titles == [
        "Held out", "Training", "Calibration", "Optimizer", "Teacher", "Speed and memory",
        "Everything else that was recorded", "Final and best values", "Settings",
    ]  # fmt: skip
    missing = [element[2] for element in document.all("p", class_="missing")]
    assert missing[0] == "Not measured: divergence from the teacher, top-1 agreement with the teacher."
    assert "Not measured: teacher's cross-entropy, teacher's mass in its top K, student's mass" in missing[3]
    both = Document(page(runs, MADE))
    kd = [e for e in both.all("figure") if (e[1]["data-kind"], e[1]["data-key"]) == ("train", "kd")]
    assert "not measured: alone" in kd[0][2] and "compare with care" not in kd[0][2]
    loss = [e for e in both.all("figure") if (e[1]["data-kind"], e[1]["data-key"]) == ("train", "loss")]
    assert "compare with care: teacher.checkpoint, loss.top_k, loss.ce_weight differ" in loss[0][2]
    ece = [e for e in both.all("figure") if e[1]["data-key"] == "ece"]
    assert len(ece) == 1 and "Not measured: accuracy over confidence." in "".join(e[2] for e in both.all("section"))


def test_every_number_of_the_metrics_has_a_place(runs):
    document = Document(page(runs, MADE))
    drawn = {(e[1]["data-kind"], e[1]["data-key"]) for e in document.all("figure")}
    recorded = {(kind, key) for run in runs for kind in ("train", "validation") for key in run.of(kind).columns}
    beside = {("train", "tokens"), ("train", "skipped"), ("validation", "tokens")}
    beside |= {("validation", "seconds"), ("validation", "teacher_ce")}  # in the table, in the chart of ce
    assert recorded - drawn == beside and drawn <= recorded
    assert {("train", f"{name}_seconds") for name in ("data", "teacher", "student")} <= drawn


def test_the_values_under_the_pointer_are_those_of_the_metrics(runs, tmp_path):
    document = Document(page(runs, MADE))
    (element,) = document.all("script", type="application/json")
    embedded = json.loads(element[2])
    assert [run["name"] for run in embedded] == ["kd", "alone"]
    for run, name in zip(embedded, ("kd", "alone"), strict=True):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for kind in ("train", "validation"):
            recorded = [line for line in lines if line["kind"] == kind]
            assert run[kind]["step"] == [line["step"] for line in recorded]
            for key in recorded[0].keys() - {"kind", "step"} - ({"tokens", "seconds"}):
                assert run[kind][key] == pytest.approx([line[key] for line in recorded], rel=1e-5), key
        steps = run["train"]["step"]
        assert run["train"]["tokens"] == [97 * s for s in steps] and run["train"]["seconds"] == [2 * s for s in steps]


def test_of_many_lines_evenly_spread_ones_are_embedded(tmp_path):
    lines = [made.train_line(step, kd=math.nan if step == 1 else 4 / step) for step in range(1, 3001)]
    document = Document(page(read_runs([made.write(tmp_path / "a", lines)]), MADE))
    (element,) = document.all("script", type="application/json")
    train = json.loads(element[2])[0]["train"]
    assert len(train["step"]) == MOST_ROWS and train["step"][0] == 1 and train["step"][-1] == 3000
    assert {b - a for a, b in itertools.pairwise(train["step"])} <= {3, 4}
    assert train["kd"][0] is None
    assert train["kd"][1:] == pytest.approx([4 / step for step in train["step"][1:]], rel=1e-5)


def test_names_are_escaped(tmp_path):
    folder = tmp_path / NASTY.replace("/", "|")
    lines = [*made.lines_of(5), {"kind": NASTY, "step": 5, NASTY: 3}, made.train_line(6, **{NASTY: 1.5})]
    made.write(folder, lines, teacher={"checkpoint": NASTY})
    made.write(tmp_path / "b", made.lines_of(5))
    runs = read_runs([folder, tmp_path / "b"])
    text = page(runs, MADE)
    document = Document(text)
    assert not document.wrong and "alert(1)" in text and "<script>alert" not in text and "<b> " not in text
    assert len(document.all("script")) == 2
    names = [e[2] for e in document.all("label") if e[1].get("title")]
    assert names == [folder.name, "b"]
    assert any(e[2] == NASTY for e in document.all("code")), "the teacher's checkpoint in the table of settings"
    (element,) = document.all("script", type="application/json")
    assert "<" not in element[2] and NASTY in json.loads(element[2])[0]["train"]


def test_a_name_that_is_not_utf8(tmp_path):
    lines = [*made.lines_of(3), made.train_line(4, **{"key_\ud800": 1.5})]
    folder = made.write(tmp_path / "a", lines).rename(tmp_path / "run_\udcff")
    text = page(read_runs([folder]), MADE).encode("utf-8").decode("utf-8")
    assert "run_\\udcff" in text and "key \\ud800" in text


def test_markup_escapes_all_but_markup():
    assert tag("b", "<", Markup("<i>"), title='"&') == '<b title="&quot;&amp;">&lt;<i></b>'
    assert (
        tag("input", checked=True, id=None, for_="a", data_key="b", hidden=False)
        == '<input checked for="a" data-key="b">'
    )
    assert join("a<", tag("i")) == "a&lt;<i></i>"


def test_final_and_best_values(runs):
    folder = runs[0].folder
    (folder / "evaluations.jsonl").write_text('{"student": "s", "ce": 9}\n{"student": "s", "ce": 3.5, "kd": NaN}\n')
    runs = read_runs([run.folder for run in runs])
    cells = {row[0]: row[1:] for row in rows(tables.finals(runs)) if row}
    ce = [3.125 + 1 / step for step in (5, 10, 15, 20)]
    assert cells["cross-entropy held out"] == [
        f"{ce[3]:.4g} nats best {ce[3]:.4g} nats at step 20",
        f"{ce[1]:.4g} nats best {ce[1]:.4g} nats at step 10",
    ]
    assert cells["divergence from the teacher held out"] == ["0.225 nats best 0.225 nats at step 20", "not measured"]
    assert cells["top-1 agreement with the teacher training"][0].startswith("96.2 % best 96.2 % at step 23")
    assert cells["cross-entropy megakd evaluate"] == ["3.5 nats", "not measured"]
    assert "learning rate training" not in cells


def test_the_best_is_marked_where_runs_can_be_compared(tmp_path):
    low = [made.validation_line(5, ce=2.0, accuracy=0.25, ece=0.5)]
    high = [made.validation_line(5, ce=2.5, accuracy=0.75, ece=0.5)]
    a, b = made.write(tmp_path / "a", low), made.write(tmp_path / "b", high)
    other = made.write(tmp_path / "c", high, data__validation="another")

    def marked(*folders):
        text = tables.finals(read_runs(folders))
        row = {r[0]: r for r in (re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in text.split("<tr>")[2:])}
        return {re.sub(r"<.*", "", name): ["<b>" in cell for cell in cells[1:]] for name, cells in row.items()}

    assert marked(a, b)["cross-entropy"] == [True, False]
    assert marked(a, b)["accuracy of the next token"] == [False, True]
    assert marked(a, b)["expected calibration error"] == [False, False], "equal"
    assert marked(a)["cross-entropy"] == [False]
    assert marked(a, other)["cross-entropy"] == [False, False], "held out on other data"


def test_phases(tmp_path):
    first = [made.train_line(1, seconds=90.0, data_seconds=80.0)]
    a = made.write(tmp_path / "a", first + [made.train_line(step) for step in range(2, 8)])
    more = [made.train_line(step, student_seconds=2.0, save_seconds=0.0) for step in range(1, 8)]
    runs = read_runs([a, made.write(tmp_path / "b", more)])
    cells = {row[0]: row[1:] for row in rows(tables.speeds(runs)) if row}
    assert cells["seconds of a step"] == ["2 s", "2 s"]
    assert cells["seconds: data"] == ["0.25 s (12%)", "0.25 s (9%)"], "of the phases where they sum to more"
    assert cells["seconds: save"] == ["not measured", "0 s (0%)"]
    assert cells["supervised tokens a second, median"] == ["48.5 tokens/s"] * 2
    assert cells["peak memory of a rank, highest"] == ["2.5 GB"] * 2
    titles = re.findall(r'title="([^"]*)"', tables.speeds(runs))
    assert titles[:4] == ["data 0.25 s, 12%", "teacher 0.5 s, 25%", "student 1.125 s, 56%", "the rest 0.125 s, 6%"]
    widths = [float(width) for width in re.findall(r"width:([\d.]+)%", tables.speeds(runs))]
    assert sum(widths[:4]) == pytest.approx(100 * 2 / 2.75, abs=0.03) and sum(widths[4:]) == pytest.approx(
        100, abs=0.03
    )


def test_facts_and_settings(runs):
    (runs[0].folder / "stopped.json").write_text('{"step": 23, "finished": true}')
    (runs[1].folder / "stopped.json").write_text('{"step": 11, "finished": false}')
    again = read_runs([run.folder for run in runs])
    cells = {row[0]: row[1:] for row in rows(tables.facts(again))}
    assert cells["state"] == ["finished", "stopped at step 11"] and cells["steps"] == ["23 of 23", "11 of 23"]
    assert cells["supervised tokens"] == ["2,231", "1,067"] and cells["time of training"] == ["46 s", "22 s"]
    assert cells["data: samples"] == ["1,234", "1,234"]
    assert rows(tables.facts(runs))[2][1] == "running, or ended without a last word"
    different = {row[0]: row[1:] for row in rows(tables.settings(runs).split("<details>")[0])}
    assert (
        different["teacher.checkpoint"] == ["runs/teacher", "teacher: null"]
        and "teacher.cache" not in different
        and different["loss.top_k"]
        == [
            "7",
            "64",
        ]
    )
    same = {row[0]: row[1:] for row in rows(tables.settings(runs).split("<details>")[1])}
    assert same["train.steps"] == ["23"] and not same.keys() & different.keys() - {""}
    twin = read_runs([runs[0].folder]) * 2
    assert "these runs have the same settings" in tables.settings(twin)


def test_notes_are_on_the_page(tmp_path):
    lines = [made.train_line(1), made.train_line(2, skipped=3, broken=1200)]
    runs = read_runs([made.write(tmp_path / "a", lines, torn="{")])
    (notes,) = Document(page(runs, MADE)).all("ul", class_="notes")
    assert "a the last line of metrics.jsonl was cut off: left out" in notes[2]
    assert "a 3 batches without a supervised token were left out" in notes[2]
    assert "a 1,200 batches that broke a step were left out" in notes[2]


def test_runs_without_a_step_give_a_page_that_says_so(tmp_path):
    text = page(read_runs([made.write(tmp_path / "a", [])]), MADE)
    assert "metrics.jsonl has no step yet" in text and "Nothing is measured yet." in text and "<figure" not in text


def test_many_runs_are_told_apart_by_line_and_colour(tmp_path):
    runs = read_runs([made.write(tmp_path / f"{i}", made.lines_of(3)) for i in range(25)])
    document = Document(page(runs, MADE))
    looks = [label[1]["class"].split()[1:] for label in document.all("label") if label[1].get("title")]
    assert len({tuple(look) for look in looks[:24]}) == 24 and len(document.all("span", class_="end run-0 c0 d0")) == 0
