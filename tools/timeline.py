"""What every rank does in a traced step, as a picture: `python tools/timeline.py RUN/profile/steps_2_2 timeline.svg`.

The traces of log.profile say by name when a model's forward runs (`forward only` is the teacher's), and autograd when
the backward does. What else the rank computes belongs to the pass before it: a teacher's targets, a student's loss;
after the last backward it is the update. The rest is waiting. Every bar is measured; nothing is drawn to a schedule.
"""

import argparse
import gzip
import json
import pathlib
import re
import sys
from typing import NamedTuple

from megakd.publish import publish_text

COLOURS = {
    "teacher forward": "#3b6fb6",
    "teacher's targets": "#a9c4e6",
    "student forward": "#3f9b5a",
    "student loss": "#b5dcae",
    "student backward": "#e08a3c",
    "update": "#8a6fb3",
}
BACKWARD = "autograd::engine::evaluate_function"
OUTSIDE = ("c10d::", "gloo:", "nccl:", "record_param_comms", "aten::empty", "Optimizer.")  # waits, or are no work
WIDTH, LEFT, ROW, GAP = 1000, 70, 34, 10


class Span(NamedTuple):
    """What a rank does from start to stop, in milliseconds."""

    what: str
    start: float
    stop: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, help="of rank_*.json.gz")
    parser.add_argument("picture", type=pathlib.Path, help="SVG that is written")
    parser.add_argument("--title", default="")
    arguments = parser.parse_args()
    files = sorted(arguments.folder.glob("rank_*.json.gz"))
    if not files:
        parser.error(f"{arguments.folder} holds no rank_*.json.gz")
    ranks = {int(re.search(r"rank_(\d+)", file.name)[1]): read_spans(file) for file in files}
    publish_text(arguments.picture, draw(ranks, arguments.title))
    return 0


def read_spans(file: pathlib.Path) -> list[Span]:
    """The spans of one rank's trace, in order, on a clock that the ranks of a machine share.

    Raises:
        ValueError: no forward pass is named in it.
    """
    with gzip.open(file, "rt") as stream:
        trace = json.load(stream)
    base_ms = trace.get("baseTimeNanoseconds", 0) / 1e6
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X" and "dur" in event]
    marks = [event for event in events if event["name"] in ("forward", "forward only")]
    if not marks:
        raise ValueError(f"{file} names no forward pass; was it traced by this megakd?")
    thread = marks[0]["tid"]  # on CUDA the backward runs in another thread
    own = [event for event in events if event["tid"] == thread or event["name"].startswith(BACKWARD)]
    own.sort(key=lambda event: (event["ts"], -event["dur"]))
    spans: list[Span] = []
    end = 0.0
    for event in own:
        kind = kind_of(event, spans[-1].what if spans else None)
        if kind is None or event["ts"] < end:  # not work, or inside of what is drawn already
            continue
        start, end = event["ts"], event["ts"] + event["dur"]
        spans.append(Span(kind, base_ms + start / 1000, base_ms + end / 1000))
    return after_the_last_backward(joined(spans))


def kind_of(event: dict, before: str | None) -> str | None:
    """What an operation that begins now is part of; None: it is no work of a step's."""
    name = event["name"]
    if name == "forward only":
        return "teacher forward"
    if name == "forward":
        return "student forward"
    if name.startswith(BACKWARD):
        return "student backward"
    if event.get("cat") != "cpu_op" or name.startswith(OUTSIDE) or before is None:
        return None
    if before.startswith("teacher"):
        return "teacher's targets"
    return "student loss" if before in ("student forward", "student loss") else "update"


def joined(spans: list[Span]) -> list[Span]:
    """Neighbours of one kind as one, where no more than a moment is between them; forward passes stay apart."""
    moment = (spans[-1].stop - spans[0].start) / WIDTH
    found: list[Span] = []
    for span in spans:
        last = found[-1] if found else None
        if last and last.what == span.what and "forward" not in span.what and span.start - last.stop < moment:
            found[-1] = Span(last.what, last.start, span.stop)
        else:
            found.append(span)
    return found


def after_the_last_backward(spans: list[Span]) -> list[Span]:
    """`update` is what follows the last backward; between two of them it is part of the first."""
    last = max((number for number, span in enumerate(spans) if span.what == "student backward"), default=len(spans))
    return [
        span._replace(what="student backward") if span.what == "update" and number < last else span
        for number, span in enumerate(spans)
    ]


def draw(ranks: dict[int, list[Span]], title: str) -> str:
    """The picture; passes are numbered in their order."""
    first = min(spans[0].start for spans in ranks.values())
    length = max(spans[-1].stop for spans in ranks.values()) - first
    scale, height = (WIDTH - LEFT - 10) / length, 60 + len(ranks) * (ROW + GAP) + 50
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="10" y="20" font-size="14">{escaped(title)}</text>',
    ]
    for line, (rank, spans) in enumerate(sorted(ranks.items())):
        top, counts = 36 + line * (ROW + GAP), {}
        parts.append(f'<text x="10" y="{top + ROW / 2 + 4}">rank {rank}</text>')
        parts.append(f'<rect x="{LEFT}" y="{top}" width="{WIDTH - LEFT - 10}" height="{ROW}" fill="#eeeeee"/>')
        for span in spans:
            x, width = LEFT + (span.start - first) * scale, max((span.stop - span.start) * scale, 0.3)
            parts.append(
                f'<rect x="{x:.2f}" y="{top}" width="{width:.2f}" height="{ROW}" fill="{COLOURS[span.what]}">'
                f"<title>{span.what}: {span.stop - span.start:.2f} ms</title></rect>"
            )
            if "forward" in span.what:
                counts[span.what] = counts.get(span.what, 0) + 1
                if width > 9:
                    text = f'<text x="{x + width / 2:.2f}" y="{top + ROW / 2 + 4}" fill="#ffffff" text-anchor="middle">'
                    parts.append(f"{text}{counts[span.what]}</text>")
    parts += legend(36 + len(ranks) * (ROW + GAP) + 6, length)
    return "\n".join([*parts, "</svg>"]) + "\n"


def legend(top: float, length_ms: float) -> list[str]:
    parts, x = [], LEFT
    for what, colour in {**COLOURS, "waiting": "#eeeeee"}.items():
        parts.append(f'<rect x="{x}" y="{top}" width="12" height="12" fill="{colour}" stroke="#999999"/>')
        parts.append(f'<text x="{x + 17}" y="{top + 11}">{escaped(what)}</text>')
        x += 30 + 7 * len(what)
    parts.append(f'<text x="{LEFT}" y="{top + 34}">{length_ms:,.0f} ms from left to right</text>')
    return parts


def escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


if __name__ == "__main__":
    sys.exit(main())
