"""`megakd evaluate CONFIG.yaml [key=value ...]`: measure a student on held-out data, against its teacher.

The student is the last checkpoint of `run.dir` if there is one, else what the student section says; or, with --model,
every checkpoint, run folder and Hugging Face folder that is named, one after the other. The divergence `kd` is taken
over `loss.top_k` entries; with a teacher that runs, or whose hidden states were recorded, the exact KL is given both
ways beside it. A student of the run itself is also appended, as one JSON line, to `evaluations.jsonl` in the run
folder.
"""

import argparse
import json
import pathlib
import time

from megakd.config import Config
from megakd.errors import ConfigError
from megakd.generation.lm_eval import check_installed
from megakd.megatron_on_cpu import install
from megakd.paths import path_argument, path_text
from megakd.progress import progress_bar
from megakd.runs.evaluate_tasks import evaluate_tasks, task_table
from megakd.runs.start import start_run

COLUMNS = (  # of the table: name, heading, format
    ("ce", "CE", ".4f"), ("perplexity", "perplexity", ".2f"), ("bits_per_byte", "bits/byte", ".4f"),
    ("forward_kl", "KL(t, s)", ".4f"), ("reverse_kl", "KL(s, t)", ".4f"), ("kd", "kd", ".4f"),
    ("teacher_ce", "teacher CE", ".4f"), ("agreement", "top-1", ".1%"), ("top5_agreement", "top-5", ".1%"),
    ("teacher_mass", "teacher mass", ".1%"), ("accuracy", "accuracy", ".1%"), ("ece", "ECE", ".4f"),
    ("tokens_per_second", "tokens/s", ",.0f"),
)  # fmt: skip


def main(argv: list[str]) -> None:
    """Run `megakd evaluate ARGV...` on this rank."""
    flags, rest = build_parser().parse_known_args(argv)
    if flags.tasks:
        check_installed("--tasks")
    with start_run(rest) as (config, ranks):
        if flags.tasks:
            install(ranks.device.type)
            return print_tasks(config, flags, ranks)
        if config.data.validation is None:
            raise ConfigError(
                "data.validation is null: there is nothing to evaluate on",
                hint="megakd evaluate CONFIG.yaml data.validation=PREFIX",
            )
        install(ranks.device.type)
        results = {}
        for path in flags.model or [own_student(config)]:
            results[path] = evaluate(config, path, ranks)
            if ranks.is_main and flags.json:
                print(json.dumps(results[path]), flush=True)
        if ranks.is_main:
            if not flags.json:
                print(table(results), flush=True)
            if flags.reliability:
                draw_reliability(results, flags.reliability)
            if not flags.model:
                append(config, *results.values())


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megakd evaluate", add_help=False, allow_abbrev=False)
    parser.add_argument("--model", action="append", type=path_text, metavar="PATH")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--tasks", type=lambda text: text.split(","), metavar="NAME,NAME")
    parser.add_argument("--task-folder", type=path_text, metavar="FOLDER")
    parser.add_argument("--task-limit", type=int, metavar="N")
    parser.add_argument("--reliability", type=path_argument, metavar="FILE.png")
    return parser


def print_tasks(config: Config, flags: argparse.Namespace, ranks) -> None:
    """lm-eval's results in place of the held-out figures."""
    results = {}
    for path in flags.model or [own_student(config)]:
        results[path] = evaluate_tasks(
            config, path, ranks, tasks=flags.tasks, folder=flags.task_folder, limit=flags.task_limit
        )
        if ranks.is_main and flags.json:
            print(json.dumps({"student": path, "tasks": results[path]}), flush=True)
    if ranks.is_main and not flags.json:
        print(task_table(results), flush=True)


def own_student(config: Config) -> str:
    """The run's last checkpoint, or what the student section names."""
    from megakd.checkpoints.folder import whole_checkpoints

    found = whole_checkpoints(config.run.dir)
    if found:
        return str(found[-1])
    if config.student.checkpoint is None:
        raise ConfigError(
            f"{config.run.dir} holds no checkpoint, and student.model alone would be evaluated with random weights",
            hint="correct run.dir, or name a student.checkpoint",
        )
    return config.student.checkpoint


def evaluate(config: Config, path: str, ranks) -> dict:
    """The figures of one model."""
    from megakd.assembly.setup import build_setup
    from megakd.models.groups import destroy_groups
    from megakd.teachers.whole import whole_of
    from megakd.training.evaluation import Evaluation, id_bytes

    student = config.student.model_copy(update={"checkpoint": path, "model": None})
    alone = {"rollouts": None, "eval": config.eval.model_copy(update={"generate": None, "tasks": []})}
    config = config.model_copy(update={"student": student, **alone})
    setup = build_setup(config, ranks.device)
    id_bytes_V = id_bytes(setup.tokenizer, ranks.device)
    evaluation = Evaluation(setup.student, whole_of(setup.teacher), setup.loss, setup.groups, id_bytes_V)
    started = time.perf_counter()
    with progress_bar(setup.validation_samples, "evaluating", shown=ranks.is_main and config.log.progress) as bar:
        metrics = evaluation(counted(setup.validation_batches(), bar, config), ranks.device)
    metrics["tokens_per_second"] = metrics["tokens"] / (time.perf_counter() - started)
    destroy_groups(setup.wider)  # the next model has its own
    return {"student": path, "validation": config.data.validation, **metrics}


def append(config: Config, result: dict) -> None:
    """Keep a line in the run folder."""
    folder = pathlib.Path(config.run.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "evaluations.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
    except OSError as error:
        raise ConfigError(
            f"the figures above could not be appended in run.dir {folder}: {error}",
            hint="give this user the right to write there, or keep them from here",
        ) from error


def counted(batches, bar, config):
    """Batches as they come, each counted when the next is asked for."""
    for batch in batches:
        yield batch
        bar.update(min(config.train.global_batch_size, bar.total - bar.n))


def table(results: dict[str, dict]) -> str:
    """A line for each model, with the figures that some model has; logarithms are natural."""
    columns = [column for column in COLUMNS if any(column[0] in result for result in results.values())]
    rows = [["model", *(heading for _, heading, _ in columns)]]
    for path, result in results.items():
        rows.append([path, *(format(result[name], form) if name in result else "-" for name, _, form in columns)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def draw_reliability(results: dict[str, dict], path: pathlib.Path) -> None:
    """How often the most likely token is right, over how likely the model finds it; a line for each model.

    Args:
        results: figures of each model; their `calibration` is drawn.
    Raises:
        ConfigError: matplotlib is missing, or the picture cannot be written.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("--reliability needs matplotlib", hint='pip install "megakd[plots]"') from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (curve, share) = pyplot.subplots(2, 1, figsize=(5, 6), height_ratios=(3, 1), sharex=True)
    curve.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for name, bins in ((name, result["calibration"]) for name, result in results.items() if "calibration" in result):
        counts, confidences, rights = (bins[key] for key in ("tokens", "confidence", "right"))
        filled = [(n, c / n, r / n) for n, c, r in zip(counts, confidences, rights, strict=True) if n]
        xs = [confidence for _, confidence, _ in filled]
        curve.plot(xs, [accuracy for *_, accuracy in filled], marker="o", markersize=3, label=name)
        share.plot(xs, [n / sum(counts) for n, *_ in filled], marker="o", markersize=3)
    curve.set(ylabel="share that is right", xlim=(0, 1), ylim=(0, 1))
    curve.legend(fontsize="small")
    share.set(xlabel="probability of the most likely token", ylabel="share of tokens", ylim=(0, None))
    try:
        figure.savefig(path, dpi=120, bbox_inches="tight")
    except (ValueError, OSError) as error:
        raise ConfigError(f"cannot write {path}: {error}", hint="a picture ends in .png, .svg or .pdf") from error
    finally:
        pyplot.close(figure)
