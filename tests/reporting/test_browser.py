"""The page in a real browser: it fits, its switches and its pointer work, nothing goes wrong in the console."""

import datetime
import html
import json
import re
import shutil
import subprocess

import pytest

from megakd.reporting.page import page
from megakd.reporting.runs import read_runs
from tests.reporting import made

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is installed"),
    pytest.mark.slow,
]
# Runs in the page after its own script and leaves what it saw as text of the document.
PROBE = """<script>
const seen = {errors: window.errors};
const box = element => { const b = element.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; };
const plot = axis => [...document.querySelectorAll(".plot[data-axis=" + axis + "]")].find(
  p => p.parentElement.dataset.kind === "train" && p.parentElement.dataset.key === "ce");
const visible = selector => [...document.querySelectorAll(selector)].filter(e => e.getClientRects().length);
seen.wide = [document.documentElement.scrollWidth, innerWidth];
seen.background = getComputedStyle(document.body).backgroundColor;
seen.axes = {};
for (const axis of ["step", "tokens", "seconds"]) {
  document.getElementById("by-" + axis).click();
  seen.axes[axis] = ["step", "tokens", "seconds"].filter(other => plot(other).getClientRects().length);
}
document.getElementById("by-seconds").click();
seen.labels = visible("main .plot .end").length;
const texts = [...plot("seconds").querySelectorAll(".end,.x,.y,.unit")].map(box).filter(b => b[2] > b[0]);
const apart = (a, b) => a[2] <= b[0] || b[2] <= a[0] || a[3] <= b[1] || b[3] <= a[1];
seen.texts = texts.length;
seen.overlaps = texts.flatMap((a, i) => texts.slice(i + 1).filter(b => !apart(a, b))).length;
const frame = box(plot("seconds")), drawn = box(plot("seconds").querySelector(".run-0 .line"));
seen.inside = drawn.every((edge, i) => i < 2 ? edge >= frame[i] - 1 : edge <= frame[i] + 1);
const move = share => {
  const [left, top, right] = box(plot("seconds")), clientX = left + share * (right - left);
  plot("seconds").dispatchEvent(new PointerEvent("pointermove", {clientX, clientY: top + 9}));
  return [...document.querySelectorAll("#tip div")].map(line => line.textContent);
};
seen.tips = [0, 12.2 / 23, 12.8 / 23, 1].map(move);
seen.dots = plot("seconds").querySelectorAll(".dot").length;
seen.dot = box(plot("seconds").querySelector(".dot"));
seen.tipInside = box(document.getElementById("tip"));
document.getElementById("show-1").click();
seen.hidden = [visible("main .charts .run-1").length, visible("main .charts .run-0").length > 0];
seen.one = move(0.5);
plot("seconds").dispatchEvent(new PointerEvent("pointerleave"));
seen.gone = [document.getElementById("tip").hidden, document.querySelectorAll(".here").length];
document.body.append(Object.assign(document.createElement("pre"), {id: "seen", textContent: JSON.stringify(seen)}));
</script>"""
WATCH = '<script>window.errors = []; addEventListener("error", e => errors.push(String(e.message))); addEventListener(\
"securitypolicyviolation", e => errors.push(e.violatedDirective + " " + e.blockedURI));</script>'


def look(text, folder, width, *flags):
    """What the probe saw of a page in a window of some width."""
    path = folder / f"page_{width}.html"
    path.write_text(text.replace("<title>", WATCH + "<title>").replace("</body>", PROBE + "</body>"), encoding="utf-8")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile_{width}",
        f"--window-size={width},900", "--virtual-time-budget=3000", *flags, "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(html.unescape(found.group(1)))


def at(name, step):
    """What is shown of a run at a step: `train_line`'s cross-entropy."""
    return f"{name} {3 + 1 / step:.5g} nats step {step}"


@pytest.fixture
def text(tmp_path):
    lines = [made.calibrated(line) if line["kind"] == "validation" else line for line in made.lines_of(23)]
    a = made.write(tmp_path / "distilled from a large teacher", lines)
    b = made.write(tmp_path / "b", made.lines_of(11), torn="{")
    return page(read_runs([a, b]), datetime.datetime(2026, 11, 27))


@pytest.mark.parametrize(("width", "dark"), [(1300, False), (500, True)])
def test_the_page_in_a_browser(text, tmp_path, width, dark):
    seen = look(text, tmp_path, width, *(["--blink-settings=preferredColorScheme=0"] if dark else []))
    assert seen["errors"] == []
    assert seen["wide"][0] <= seen["wide"][1] == width, "nothing sticks out at the side"
    assert (sum(map(int, re.findall(r"\d+", seen["background"])[:3])) < 120) is dark
    assert seen["axes"] == {axis: [axis] for axis in ("step", "tokens", "seconds")}, "one axis is seen at a time"
    assert (seen["labels"] > 0) is (width > 640)
    assert seen["texts"] > 8 and seen["overlaps"] == 0 and seen["inside"]
    long = "distilled from a large teacher"
    assert seen["tips"][0] == [f"{long} 4 nats step 1", "b 4 nats step 1"]
    assert seen["tips"][1:] == [[at(long, step), at("b", 11)] for step in (12, 13, 23)] and seen["dots"] == 2
    left, top, right, bottom = seen["tipInside"]
    assert left >= 0 and top >= 0 and right <= width and bottom <= 900
    assert seen["hidden"] == [0, True] and [tip[:9] for tip in seen["one"]] == ["distilled"]
    assert seen["gone"] == [True, 0]
