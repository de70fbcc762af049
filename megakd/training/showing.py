"""What the student can do, looked at with every validation: completions to read, tasks of lm-eval."""

import pathlib
from collections.abc import Callable

from megakd.assembly.setup import Setup
from megakd.errors import TrainingError
from megakd.generation.engine import Engine, Request
from megakd.generation.lm_eval import check_installed
from megakd.generation.mirror import Mirror
from megakd.generation.results import describe, line_of
from megakd.generation.stops import build_stops
from megakd.generation.together import write_together
from megakd.kernels.next_tokens import Choice
from megakd.publish import make_folder, publish_text
from megakd.ranks import from_rank_0
from megakd.ranks.pulse import Pulse

FOLDER = "generations"  # in the run folder
SLOTS = 16  # sequences written or scored at once in one model


class Showing:
    """Called with every validation.

    Args:
        setup: of a run whose eval section has generate or tasks.
        mirror: the student as it generates.
        pulse: of the launch; tasks may take any time.
    Raises:
        ConfigError: lm-eval is missing, or has no such task.
    """

    def __init__(self, setup: Setup, mirror: Mirror, pulse: Pulse):
        self.setup, self.mirror, self.pulse, self.section = setup, mirror, pulse, setup.config.eval
        self.manager = None
        if self.section.tasks:
            check_installed("eval.tasks")
            from megakd.generation.tasks import open_tasks

            self.manager = open_tasks(self.section.tasks, self.section.task_folder, "eval.task_folder=FOLDER")

    def __call__(self, step: int, stopping: Callable[[], bool]) -> dict[str, float] | None:
        """Write completions beside the metrics, and measure the tasks; None when asked to stop.

        Args:
            step: optimizer steps done.
            stopping: asked again and again, on all ranks alike, before the tasks begin.
        Returns:
            TASK/METRIC -> value, equal on all ranks.
        Raises:
            TrainingError: on every rank; completions cannot be written.
        Collectives: those of generating and scoring, two broadcasts.
        """
        if self.section.generate is not None and not self.generate(step, stopping):
            return None
        if not self.section.tasks:
            return {}
        if stopping():
            return None
        self.pulse.mark("tasks", step)
        return self.tasks()

    def generate(self, step: int, stopping: Callable[[], bool]) -> bool:
        setup, section = self.setup, self.section.generate
        engine = Engine(
            self.mirror.gpt(), setup.groups, setup.device, Choice(section.temperature, top_p=section.top_p),
            build_stops(setup.tokenizer, (), ()), max_new_tokens=section.max_new_tokens, slots=SLOTS,
            seed=setup.config.run.seed,
        )  # fmt: skip
        requests = [Request(number, 0, tuple(prompt.ids)) for number, prompt in setup.shown.items()]
        sequences = write_together(engine, requests, stopping)
        if sequences is None:
            return False
        sequences.sort(key=lambda sequence: sequence.request.prompt)
        path = pathlib.Path(setup.config.run.dir) / FOLDER / f"step_{step:08d}.jsonl"

        def write() -> None:
            texts = (setup.shown[sequence.request.prompt].text for sequence in sequences)
            lines = [
                line_of({"step": step} | describe(sequence, text, setup.tokenizer.fingerprint))
                for sequence, text in zip(sequences, texts, strict=True)
            ]
            try:
                make_folder(path.parent)
                publish_text(path, "".join(lines))
            except OSError as error:
                raise TrainingError(
                    f"{path} cannot be written: {error}", hint="free space on that disk, or leave eval.generate out"
                ) from error

        from_rank_0(write)
        return True

    def tasks(self) -> dict[str, float]:
        from megakd.generation.tasks import Adapter, run_tasks

        setup = self.setup
        adapter = Adapter(self.mirror.gpt(), setup.tokenizer, setup.groups, setup.device, SLOTS)
        found = run_tasks(adapter, self.section.tasks, self.manager, self.section.task_limit)
        found = from_rank_0(lambda: found)
        return {
            f"{task}/{name.removesuffix(',none')}": value
            for task, values in found.items()
            for name, value in values.items()
            if "_stderr" not in name and name != "sample_len"
        }
