"""In which settings runs differ, and which of those change what a metric means."""

from megakd.reporting.runs import Run

OF_A_FOLDER = ("run.dir",)  # of course it differs
TEACHER = ("teacher.checkpoint", "teacher.cache")
DIVERGENCE = tuple(
    f"loss.{name}"
    for name in ("divergence", "tail", "beta", "skew", "alpha", "top_k", "temperature", "student_temperature")
)
# Settings that a metric depends on by its definition, and not by what was learnt; a key stands for those below it too.
DEFINES = {
    "loss": ("loss", "features", *TEACHER),
    "kd": (*DIVERGENCE, "loss.ramps.temperature", *TEACHER),
    "features": ("features", *TEACHER),
    "agreement": TEACHER,
    "teacher_ce": TEACHER,
    "teacher_mass": ("loss.top_k", *TEACHER),
    "student_mass": ("loss.top_k", *TEACHER),
}
READ = ("data.tokenizer", "data.sequence_length", "data.format", "data.template", "data.answer_only_loss")
SOURCES = {"train": (*READ, "data.train", "rollouts"), "validation": (*READ, "data.validation", "eval.samples")}


def differing(runs: list[Run]) -> list[str]:
    """Keys whose text is not the same in all runs with a config; `versions.NAME` is a package's version."""
    flats = [setting_texts(run) for run in runs if run.config]
    keys = list(dict.fromkeys(key for flat in flats for key in flat))
    different = [key for key in keys if key not in OF_A_FOLDER and len({compared(flat, key) for flat in flats}) > 1]
    return [key for key in different if not any(other.startswith(f"{key}.") for other in different)]


def setting_texts(run: Run) -> dict[str, str]:
    return run.config | {f"versions.{name}": version for name, version in run.versions.items()}


def value_at(flat: dict[str, str], key: str) -> str:
    """A key's text; of a key that is not there, what stands for its section (`null`), or that it is not there."""
    parts = key.split(".")
    for n in range(len(parts), 0, -1):
        if (text := flat.get(".".join(parts[:n]))) is not None:
            return text if n == len(parts) else f"{'.'.join(parts[:n])}: {text}"
    return "not there"


def compared(flat: dict[str, str], key: str) -> str:
    """A key's text as it is compared: a key that is null is as good as one of a section that is null."""
    text = value_at(flat, key)
    return "null" if key not in flat and text.endswith(": null") else text


def care(runs: list[Run], kind: str, key: str) -> list[str]:
    """The settings that make a metric another quantity in some of the runs that have it."""
    defining = (*DEFINES.get(key, ()), *SOURCES.get(kind, ()))
    different = differing([run for run in runs if key in run.of(kind).columns])
    return [name for name in different if any(name == d or name.startswith(f"{d}.") for d in defining)]
