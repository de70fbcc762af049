"""The log section: where metrics go, and what is looked at more closely."""

from collections.abc import Iterator

from pydantic import Field

from megakd.config.section import Count, CountOrZero, Section, Text


class Profile(Section):
    """Where the time of some steps goes, operation by operation"""

    steps: list[Count]
    """First and last optimizer step that is traced, `[10, 12]`: for each rank a trace of torch's profiler in `profile`
    in the run folder (Perfetto opens it), and on CUDA a snapshot of what memory is used for
    (memory_viz of PyTorch opens it). The steps are slower for it."""
    ranks: list[CountOrZero] | None = None
    """Ranks that are traced; null: all."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if len(self.steps) != 2 or self.steps[0] > self.steps[-1]:
            yield "steps", f"{self.steps}; expected [first, last]"


class Log(Section):
    """Where metrics go beside metrics.jsonl"""

    every_steps: Count = 1
    """Optimizer steps between lines."""
    progress: bool = True
    """Progress bar on rank 0."""
    tensorboard: bool = False
    """TensorBoard files in the run folder."""
    wandb_project: Text | None = None
    """Weights & Biases project; null: not used. Needs `pip install "megakd[wandb]"`."""
    wandb_entity: Text | None = None
    """User or team that the project belongs to; null: the account's own."""
    wandb_group: Text | None = None
    """Group that the run is shown in, such as a sweep; null: none."""
    wandb_tags: list[Text] = Field([])
    """Tags of the run."""
    profile: Profile | None = None

    def problems(self) -> Iterator[tuple[str, str]]:
        for key in ("wandb_entity", "wandb_group", "wandb_tags"):
            if getattr(self, key) and self.wandb_project is None:
                yield key, f"{getattr(self, key)} has no effect without wandb_project"
