"""`megakd evaluate CONFIG.yaml [key=value ...]`: measure a student on held-out data, against its teacher.

The student is the last checkpoint of `run.dir` if there is one, else what the student section says. The divergence is
taken over `loss.top_k` entries: with the vocabulary's size it is the exact KL. Prints one JSON line, and appends it to
`evaluations.jsonl` in the run folder.
"""

import json
import pathlib

from megakd.errors import ConfigError
from megakd.megatron_on_cpu import install
from megakd.progress import progress_bar
from megakd.runs.start import start_run


def main(argv: list[str]) -> None:
    """Run `megakd evaluate ARGV...` on this rank."""
    with start_run(argv) as (config, ranks):
        if config.data.validation is None:
            raise ConfigError(
                "data.validation is null: there is nothing to evaluate on",
                hint="megakd evaluate CONFIG.yaml data.validation=PREFIX",
            )
        install(ranks.device.type)
        from megakd.assembly.setup import build_setup
        from megakd.checkpoints.folder import whole_checkpoints
        from megakd.training.evaluation import Evaluation

        found = whole_checkpoints(config.run.dir)
        if found:
            student = config.student.model_copy(update={"checkpoint": str(found[-1]), "model": None})
            config = config.model_copy(update={"student": student})
        elif config.student.checkpoint is None:
            raise ConfigError(
                f"{config.run.dir} holds no checkpoint, and student.model alone would be evaluated with random weights",
                hint="correct run.dir, or name a student.checkpoint",
            )
        setup = build_setup(config, ranks.device)
        evaluation = Evaluation(setup.student, setup.teacher, setup.loss, setup.groups)
        shown = ranks.is_main and config.log.progress
        with progress_bar(setup.validation_samples, "evaluating", shown=shown) as bar:
            metrics = evaluation(counted(setup.validation_batches(), bar, config), ranks.device)
        if ranks.is_main:
            source = str(found[-1]) if found else config.student.checkpoint
            line = json.dumps({"student": source, "validation": config.data.validation, **metrics})
            print(line, flush=True)
            folder = pathlib.Path(config.run.dir)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with open(folder / "evaluations.jsonl", "a", encoding="utf-8") as file:
                    file.write(line + "\n")
            except OSError as error:
                raise ConfigError(
                    f"the line above could not be appended in run.dir {folder}: {error}",
                    hint="give this user the right to write there, or keep the line from here",
                ) from error


def counted(batches, bar, config):
    """Batches as they come, each counted when the next is asked for."""
    for batch in batches:
        yield batch
        bar.update(min(config.train.global_batch_size, bar.total - bar.n))
