"""A comparison of two records in words."""

from megakd.steps.compare import STAGES, Stage, Tolerance
from megakd.steps.folder import StepRecord

LOOK_AT = {
    "ids": "the data: another file, tokenizer, template, order (run.seed) or packing",
    "labels": "masks: another template, or data.answer_only_loss",
    "targets": "the teacher: another checkpoint, its rotary embedding, norms or vocabulary; loss.temperature",
    "losses": "the student's forward pass or the loss: the same ids and targets give other losses",
    "gradients": "the backward pass, or how ranks add their gradients up: every loss is the same",
}


def report(a: StepRecord, b: StepRecord, tolerance: Tolerance, stages: list[Stage]) -> str:
    """What was compared, each stage in the order of computation, and where to look.

    Args:
        a: the recorded step.
        b: the replayed one.
    """
    lines = [
        f"recorded: {a.path}\n          {a.describe()}",
        f"replayed: {b.path}\n          {b.describe()}",
        f"allowed : {tolerance.targets:g} nats of a log-probability, {tolerance.losses:g} of a loss, "
        f"{tolerance.gradients:g} of a norm",
        *notes(a, b),
        "",
    ]
    width = max(map(len, STAGES.values()))
    first = next((stage for stage in stages if stage.differs), None)
    for stage in stages:
        said = "equal" if not stage.differs else "DIFFER" if stage is first else "differ"
        lines.append(f"{STAGES[stage.name]:<{width}}  {said:<6}  {stage.summary}")
        if stage is first:
            lines += [f"    {line}" for line in stage.lines]
    if first is None:
        return "\n".join([*lines, "", "the steps agree"])
    last = f"first difference: {STAGES[first.name]}; look at {LOOK_AT[first.name]}"
    return "\n".join([*lines, "", last])


def notes(a: StepRecord, b: StepRecord) -> list[str]:
    """What is another by intention or by mistake, and no reason not to compare."""
    found = []
    if a.values["data"] != b.values["data"]:
        changed = [key for key in a.values["data"] if a.values["data"][key] != b.values["data"].get(key)]
        found.append(f"note    : other data: {named(a.values['data'], b.values['data'], changed)}")
    ours, theirs = (record.values["teacher"] for record in (a, b))
    if ours["kind"] != theirs["kind"]:
        found.append(f"note    : the teacher was {ours['kind']}, it is {theirs['kind']}")
    elif changed := differing(ours["model"] or {}, theirs["model"] or {}):
        found.append(f"note    : another teacher: {named(ours['model'], theirs['model'], changed)}")
    return found


def differing(a: dict, b: dict) -> list[str]:
    """Keys of both, in order, that have not the same value."""
    return [key for key in a if key in b and a[key] != b[key]]


def named(a: dict, b: dict, keys: list[str]) -> str:
    return ", ".join(f"{key} {short(a[key])} -> {short(b.get(key))}" for key in keys)


def short(value) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:20]}..."
