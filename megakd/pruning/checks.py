"""What of a config is refused before the ranks meet, or before any weight is read; needs no Megatron."""

import os
import pathlib

from megakd.config import Config, Model
from megakd.config.problems import problems_error
from megakd.errors import ConfigError
from megakd.pruning.sizes import problems


def check_config(config: Config) -> None:
    """What can be seen before the ranks meet.

    Raises:
        ConfigError: something is missing, or this verb cannot run so.
    """
    if config.teacher is None or config.teacher.checkpoint is None or config.student.checkpoint is None:
        raise ConfigError(
            "teacher.checkpoint and student.checkpoint are both needed to prune: what is cut, and what is written",
            hint="megakd prune CONFIG.yaml teacher.checkpoint=RUN student.checkpoint=NEW_FOLDER student.model=null",
        )
    if config.parallel.cp > 1:
        raise ConfigError(
            f"parallel.cp is {config.parallel.cp}, but importances are of whole sequences",
            hint="prune with parallel.cp=1, such as with those ranks as parallel.tp and parallel.sp=true; the student "
            "is trained at any cp",
        )
    target = pathlib.Path(config.student.checkpoint)
    if os.path.lexists(target):
        raise ConfigError(
            f"student.checkpoint {target} exists; `megakd prune` writes it",
            hint="name another folder, or remove this one",
        )


def as_teacher(config: Config) -> Config:
    """The config at the layout that the model runs at: nothing is beside it, so it is the teacher's own."""
    return config.model_copy(update={"parallel": config.teacher_parallel})


def check_sizes(config: Config, model: Model) -> None:
    """Raises ConfigError where the model cannot be cut so."""
    tp = config.prune.tp or config.parallel.tp
    found = [f"prune.{key}: {text}" for key, text in problems(model, config.prune, tp)]
    if found:
        raise problems_error(
            f"teacher.checkpoint {config.teacher.checkpoint}",
            found,
            hint="`megakd prune CONFIG.yaml --dry-run` shows the sizes of the model and its student",
        )
