"""Where lines stand in tokens and in time, which only training lines say."""

import bisect
import math


def axes_of(steps: list[int], trained: list[int], columns: dict[str, list[float | None]]) -> dict[str, list[float]]:
    """Axis to where every line of some kind stands on it; an axis that was not measured is left out.

    Seconds are those of training steps, without validation and what is between launches; where not every step has a
    line, the steps before a line count as long as its own. Lines of other kinds stand between the training lines around
    them.

    Args:
        steps: of the lines.
        trained, columns: steps and metrics of the training lines.
    """
    found: dict[str, list[float]] = {"step": steps}
    measured = {"tokens": filled(columns.get("tokens", [])), "seconds": summed(trained, columns.get("seconds", []))}
    for axis, places in measured.items():
        if places:
            found[axis] = places if steps == trained else between(trained, places, steps)
    return found


def summed(steps: list[int], seconds: list[float | None]) -> list[float]:
    """Seconds from the start to the end of every step that has a line."""
    total, places = 0.0, []
    for step, before, of_one in zip(steps, [0, *steps], filled(seconds), strict=False):
        total += of_one * (step - before)
        places.append(total)
    return places


def filled(values: list[float | None]) -> list[float]:
    """Gaps take the value before them, or at the beginning the first one; empty where there is none at all."""
    last = next((value for value in values if value is not None and math.isfinite(value)), None)
    if last is None:
        return []
    whole = []
    for value in values:
        last = value if value is not None and math.isfinite(value) else last
        whole.append(last)
    return whole


def between(trained: list[int], places: list[float], steps: list[int]) -> list[float]:
    """Places of steps, linear between the training lines around them; 0 at step 0, the last one's after it."""
    trained, places, found = [0, *trained], [0.0, *places], []
    for step in steps:
        after = bisect.bisect_left(trained, step)
        if after == len(trained) or trained[after] == step:
            found.append(places[min(after, len(places) - 1)])
            continue
        share = (step - trained[after - 1]) / (trained[after] - trained[after - 1])
        found.append(places[after - 1] + share * (places[after] - places[after - 1]))
    return found
