"""Two records of one step, compared if they are of one run: what differs first, in words."""

from megakd.errors import ConfigError, StepError
from megakd.steps.compare import TOLERANCES, Tolerance, compare
from megakd.steps.folder import StepRecord
from megakd.steps.whole import read_whole
from megakd.steps.words import differing, named, report

# What a step computes; where and how fast is left free, and what shows in the ids is compared there.
DEFINING = ("loss", "features", "data.sequence_length", "data.packing", "train.global_batch_size", "run.seed")
FREE = ("loss.logits_memory_budget_bytes",)


def compare_records(a: StepRecord, b: StepRecord, flags: dict[str, float]) -> tuple[str, bool]:
    """Two records in words, and whether something differs. On one rank.

    Args:
        a: the recorded step.
        b: the replayed one.
        flags: fields of Tolerance that are not to be those of the coarser precision of the two.
    """
    if a.values["step"] != b.values["step"]:
        raise StepError(
            f"{a.path} is step {a.values['step']}, {b.path} step {b.values['step']}", hint="compare the same step"
        )
    check_settings(a, b.values["settings"], str(b.path))
    check_student(a, b.values["model"], b.values["tokenizer"], str(b.path))
    precisions = {record.values["precision"] for record in (a, b)}
    given = vars(TOLERANCES["fp32" if precisions == {"fp32"} else "bf16"]) | flags
    tolerance = Tolerance(**given)
    stages = compare(read_whole(a), read_whole(b), tolerance)
    return report(a, b, tolerance, stages), any(stage.differs for stage in stages)


def check_settings(record: StepRecord, settings: dict, whose: str) -> None:
    """Raises ConfigError where what is compared is another step by its own settings.

    A key that one of the two does not have is of another version of megakd and says nothing.
    """
    known = record.values["settings"]
    teachers = [any(name.startswith("teacher.") for name in keys) for keys in (known, settings)]
    if teachers[0] != teachers[1]:
        raise ConfigError(
            f"{record.path} was recorded {'with' if teachers[0] else 'without'} a teacher, {whose} has "
            f"{'one' if teachers[1] else 'none'}",
            hint="use the config.yaml of the recorded run",
        )
    defining = DEFINING if teachers[0] else tuple(name for name in DEFINING if name not in ("loss", "features"))
    changed = [
        key
        for key in differing(known, settings)
        if any(key == name or key.startswith(f"{name}.") for name in defining) and key not in FREE
    ]
    if changed:
        raise ConfigError(
            f"{record.path} records a step of other settings than {whose}: {named(known, settings, changed)}",
            hint="use the config.yaml of the recorded run, and change layout, device and precision alone",
        )


def check_student(record: StepRecord, model: dict, tokenizer: str, whose: str) -> None:
    """Raises ConfigError where the student or the tokenizer is another one."""
    known = record.values["model"]
    if changed := differing(known, model):
        raise ConfigError(
            f"{record.path} records a step of another model than {whose}: {named(known, model, changed)}",
            hint="use the config.yaml of the recorded run",
        )
    if record.values["tokenizer"] != tokenizer:
        raise ConfigError(
            f"{record.path} was recorded with tokenizer {record.values['tokenizer'][:12]}, {whose} has "
            f"{tokenizer[:12]}",
            hint="use the data.tokenizer of the recorded run",
        )
