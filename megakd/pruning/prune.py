"""A student cut out of a checkpoint: importances, what is kept, its weights; a folder that is whole or not there."""

import logging
import pathlib

from torch import Tensor

from megakd.assembly.architectures import check_teacher
from megakd.cache.fingerprint import folder_fingerprint
from megakd.checkpoints import folder
from megakd.checkpoints.folder import Checkpoint
from megakd.config import Config
from megakd.converters.direct import open_checkpoint
from megakd.converters.huggingface.exporting import MegatronWeights
from megakd.data.tokenizers.load import load_tokenizer
from megakd.data.tokenizers.tokenizer import Tokenizer
from megakd.errors import CheckpointError, ConfigError
from megakd.pruning.calibration import calibrate
from megakd.pruning.checks import as_teacher, check_sizes
from megakd.pruning.choose import Kept, choose, student_of
from megakd.pruning.cut import cut, known_names
from megakd.pruning.sizes import cuts_of, table
from megakd.ranks import Ranks, from_rank_0

LOG = logging.getLogger("megakd")
DIGITS = 5  # of an importance in the record
MOST_NUMBERS = 1 << 23  # of one array there; inner channels of very many experts are more


def prune(config: Config, ranks: Ranks, command: str) -> str:
    """Cut `student.checkpoint` out of `teacher.checkpoint`.

    Args:
        command: what was typed, for the record.
    Returns:
        a table of the sizes.
    Raises:
        ConfigError, CheckpointError, DataError: on every rank; nothing of the student is left.
    """
    teacher = from_rank_0(lambda: open_teacher(config))
    tokenizer = load_teachers_tokenizer(config, teacher)
    keys, importances, data = set(cuts_of(teacher.model, config.prune)), {}, None
    if keys:
        if config.data.train is None or tokenizer is None:
            lacking = "data.train" if tokenizer else "data.tokenizer"
            raise ConfigError(
                f"{lacking} is null, and {', '.join(sorted(keys))} are chosen by importance, which is measured on data",
                hint="name it, or leave out layers by prune.keep_layers or prune.drop_layers alone",
            )
        importances, data = calibrate(as_teacher(config), teacher, tokenizer, keys, ranks)
    kept = choose(teacher.model, config.prune, importances)
    record = {
        "command": command,
        "teacher": str(teacher.path),
        "asked": config.prune.model_dump(exclude_defaults=True),
        "data": data,
        "kept": {"num_layers": kept.layers} | {key: plain(kept.of_left_layers(key)) for key in kept.parts},
        "importances": {key: plain(values) for key, values in importances.items()},
    }
    from_rank_0(lambda: write(config, teacher, tokenizer, kept, record))
    return table(teacher.model, config.prune, kept.layers)


def open_teacher(config: Config) -> Checkpoint:
    """What is cut, once it is known that it can be cut so. One rank calls it."""
    teacher = open_checkpoint(config.teacher.checkpoint, config.checkpoint.verify, progress=config.log.progress)
    check_sizes(config, teacher.model)
    known_names(MegatronWeights(teacher))
    return teacher


def load_teachers_tokenizer(config: Config, teacher: Checkpoint) -> Tokenizer | None:
    """That of the data and the model; None where neither names one.

    Raises:
        CheckpointError, ConfigError: they have two; the model does not fit the layout or data.sequence_length.
    """
    path = config.data.tokenizer or teacher.tokenizer_path
    if path is None:
        return None
    tokenizer = load_tokenizer(folder.tokenizer_path(path))
    check_teacher(config, teacher, tokenizer)
    return tokenizer


def write(config: Config, teacher: Checkpoint, tokenizer: Tokenizer | None, kept: Kept, record: dict) -> None:
    """The student's folder. One rank calls it.

    Raises:
        CheckpointError: it cannot be written; nothing is left of it.
    """
    path, student = pathlib.Path(config.student.checkpoint), student_of(teacher.model, config.prune, kept)
    try:
        target = folder.begin(path)
        written = cut(teacher, target, student, kept, progress=config.log.progress)
        record = record | {"teacher_fingerprint": folder_fingerprint(teacher.path)}
        parts = {"model": student, "step": 0, "training": False, "metrics": {}, "data": teacher.data}
        folder.publish(path, tokenizer=tokenizer, origin=teacher.path, written=written, pruning=record, **parts)
    except OSError as error:
        folder.discard(path)
        raise CheckpointError(
            f"student.checkpoint {path} could not be written: {error}",
            hint="free space on the disk, or choose another folder; nothing was kept",
        ) from error
    except BaseException:
        folder.discard(path)
        raise
    LOG.info("%s: layers %s of %s", path, ", ".join(map(str, kept.layers)), teacher.path)


def plain(values: Tensor) -> list | str:
    """An array as the record has it: a list of numbers; of several axes, lists of texts of numbers, a line each. What
    is too large for a record is its shape alone."""
    if values.numel() > MOST_NUMBERS:
        return f"{list(values.shape)}, not kept"
    if values.dim() > 2:
        return [plain(part) for part in values]
    rounded = [[float(f"{value:.{DIGITS}g}") if values.is_floating_point() else value for value in row]
               for row in values.reshape(-1, values.shape[-1]).tolist()]  # fmt: skip
    return rounded[0] if values.dim() == 1 else [" ".join(map(str, row)) for row in rounded]
