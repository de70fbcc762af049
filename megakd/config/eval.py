"""The eval section: what is looked at while a run trains."""

from collections.abc import Iterator

from pydantic import Field

from megakd.config.paths import LocalPath
from megakd.config.rollouts import FORMATS, axes_in_the_way
from megakd.config.section import Count, NotNegative, Section, Share, Text


class Generate(Section):
    """Prompts that the student completes at every validation, into `generations` in the run folder, to be read"""

    prompts: LocalPath
    """Prompts: a file, folder or pattern in any form that data.train takes; answers that are there are left out."""
    format: FORMATS = "auto"
    """What a record of prompts is, as of data.format; its keys, templates and bos are those of the data section."""
    limit: Count | None = 16
    """Prompts that are completed, the first of the file; null: all."""
    max_new_tokens: Count = 128
    """Tokens after which a completion ends at the latest. Prompt and completion fit data.sequence_length."""
    temperature: NotNegative = 0.0
    """Divides the logits that tokens are drawn from, with the same draws at every validation; 0 takes the most likely
    token."""
    top_p: Share | None = None
    """Draw from the most likely tokens that together have this probability; null: from all."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.temperature == 0 and self.top_p is not None:
            yield "top_p", f"{self.top_p} has no effect at temperature 0, which takes the most likely token"


class Eval(Section):
    """Validation while training"""

    every_steps: Count | None = None
    """Optimizer steps between validations; null: none."""
    samples: Count | None = None
    """Samples of one validation; null: the whole validation set."""
    generate: Generate | None = None
    tasks: list[Text] = Field([])
    """Tasks of EleutherAI's lm-eval whose metrics are added to every validation's, as TASK/METRIC. Needs `pip install
    "megakd[eval]"`."""
    task_folder: LocalPath | None = None
    """Folder with YAML files of further tasks."""
    task_limit: Count | None = None
    """Documents of each task; null: all."""

    @property
    def writes(self) -> bool:
        """Whether the student generates at a validation."""
        return self.generate is not None or bool(self.tasks)

    def problems(self) -> Iterator[tuple[str, str]]:
        for key in ("task_folder", "task_limit"):
            if getattr(self, key) is not None and not self.tasks:
                yield key, f"{getattr(self, key)} has no effect without tasks"

    def problems_in(self, config) -> Iterator[tuple[str, str]]:
        """Yields (dotted key, what is wrong) for rules between this section and the others of a run."""
        if self.every_steps is not None and config.data.validation is None:
            yield "eval.every_steps", f"{self.every_steps}, but data.validation is null"
        if not self.writes:
            return
        key, length = "eval.generate" if self.generate else "eval.tasks", config.data.sequence_length
        if config.data.validation is None:
            yield key, "given, but data.validation is null: there is no validation to add to"
        if self.generate is not None and self.generate.max_new_tokens > length:
            seen = self.generate.max_new_tokens
            yield "eval.generate.max_new_tokens", f"{seen} leaves no room for a prompt in {length} tokens"
        yield from axes_in_the_way(config.parallel, key)
