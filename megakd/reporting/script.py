"""The page's script: the values of all runs at the step, token or second under the pointer. Without it nothing but
that is missing."""

SCRIPT = r"""
"use strict";
(() => {
  const runs = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");
  const digits = new Intl.NumberFormat("en", {maximumSignificantDigits: 5});
  const number = value => value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(3) : digits.format(value);

  function nearest(xs, ys, x) {  // the row closest to x that has a value
    let low = 0, high = xs.length - 1;
    while (low < high) { const middle = (low + high) >> 1; if (xs[middle] < x) low = middle + 1; else high = middle; }
    let left = low - 1, right = low;
    while (left >= 0 && ys[left] === null) left--;
    while (right < xs.length && ys[right] === null) right++;
    if (left < 0) return right < xs.length ? right : -1;
    if (right >= xs.length) return left;
    return x - xs[left] <= xs[right] - x ? left : right;
  }

  function shownRuns(plot) {
    const {kind, key} = plot.parentElement.dataset;
    return runs.flatMap((run, i) => {
      const ys = run[kind][key], xs = run[kind][plot.dataset.axis];
      const box = document.getElementById("show-" + i);
      return ys && xs && box.checked ? [{run, xs, ys, steps: run[kind].step}] : [];
    });
  }

  function height(figure, value) {  // 0 at the top of the box and above it, 1 at its bottom
    const low = +figure.low, high = +figure.high, log = "log" in figure;
    return Math.max(0, 1 - (log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low)));
  }

  function clear(plot) {
    plot.querySelectorAll(".here").forEach(mark => mark.remove());
    tip.hidden = true;
  }

  function mark(plot, className, left, top) {
    const element = document.createElement("i");
    element.className = "here " + className;
    element.style.left = 100 * left + "%";
    if (top !== null) element.style.top = 100 * top + "%";
    plot.append(element);
  }

  function point(plot, event) {
    clear(plot);
    const box = plot.getBoundingClientRect(), figure = plot.parentElement.dataset, end = +plot.dataset.end;
    const x = Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1) * end;
    tip.replaceChildren();
    for (const {run, xs, ys, steps} of shownRuns(plot)) {
      const row = nearest(xs, ys, x);
      if (row < 0) continue;
      const value = ys[row] * figure.factor;
      mark(plot, "dot " + run.class, xs[row] / end, height(figure, value));
      const line = document.createElement("div"), swatch = document.createElement("i");
      const unit = figure.unit ? " " + figure.unit : "";
      line.className = run.class;
      const strong = Object.assign(document.createElement("b"), {textContent: number(value) + unit});
      line.append(swatch, run.name + " ", strong, " step " + steps[row].toLocaleString("en"));
      tip.append(line);
    }
    if (!tip.childElementCount) return;
    mark(plot, "cross", x / end, null);
    tip.hidden = false;
    const right = event.clientX + 16 + tip.offsetWidth < innerWidth;
    tip.style.left = Math.max(4, right ? event.clientX + 16 : event.clientX - 16 - tip.offsetWidth) + "px";
    tip.style.top = Math.max(4, Math.min(event.clientY + 16, innerHeight - tip.offsetHeight - 4)) + "px";
  }

  for (const plot of document.querySelectorAll(".plot[data-axis]")) {
    plot.addEventListener("pointermove", event => point(plot, event));
    plot.addEventListener("pointerdown", event => point(plot, event));
    plot.addEventListener("pointerleave", () => clear(plot));
  }
})();
"""
