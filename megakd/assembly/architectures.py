"""What student and teacher start from, the tokenizer they share, and whether they fit each other and the layout."""

from megakd.checkpoints.folder import Checkpoint, tokenizer_path
from megakd.config import Config, Model, check_model
from megakd.converters.direct import open_checkpoint
from megakd.data.tokenizers.load import load_tokenizer
from megakd.errors import CheckpointError, ConfigError


def read_both(config: Config) -> tuple[Checkpoint | None, Checkpoint | None]:
    """What student and teacher start from; of a run folder, its last checkpoint at this moment."""
    paths = (config.student.checkpoint, config.teacher.checkpoint if config.teacher else None)
    return tuple(read_one(config, path) if path else None for path in paths)


def read_one(config: Config, path: str) -> Checkpoint:
    """What a model starts from."""
    return open_checkpoint(path, config.checkpoint.verify, progress=config.log.progress)


def choose_tokenizer(config: Config, student_from: Checkpoint | None):
    path = config.data.tokenizer or (student_from.tokenizer_path if student_from else None)
    if path is None:
        raise ConfigError(
            f"no tokenizer: data.tokenizer is null and {student_from.path} carries none",
            hint="set data.tokenizer to the tokenizer file the data was prepared with",
        )
    tokenizer = load_tokenizer(tokenizer_path(path))
    if student_from and student_from.tokenizer_fingerprint not in (None, tokenizer.fingerprint):
        raise ConfigError(
            f"data.tokenizer {path} ({tokenizer.fingerprint[:12]}) is not the tokenizer of student.checkpoint "
            f"{student_from.path} ({student_from.tokenizer_fingerprint[:12]})",
            hint="leave data.tokenizer out to use the checkpoint's",
        )
    return tokenizer


def with_vocab(model: Model, tokenizer, whose: str) -> Model:
    """The section with its vocabulary filled in; it may be wider than the tokenizer's, never narrower."""
    size = model.vocab_size or tokenizer.vocab_size
    if size < tokenizer.vocab_size:
        raise ConfigError(
            f"{whose} has a vocabulary of {size} ids, the tokenizer {tokenizer.vocab_size}",
            hint="leave model.vocab_size out, or use the tokenizer that belongs to the model",
        )
    return model.model_copy(update={"vocab_size": size})


def check_teacher(config: Config, teacher: Checkpoint, tokenizer) -> None:
    """Raises unless the teacher speaks the same tokens and fits the layout."""
    if teacher.tokenizer_fingerprint != tokenizer.fingerprint:
        theirs = (teacher.tokenizer_fingerprint or "none recorded")[:12]
        raise CheckpointError(
            f"teacher {teacher.path} was trained with tokenizer {theirs} ({teacher.model.vocab_size} ids), "
            f"this run uses {tokenizer.fingerprint[:12]} ({tokenizer.vocab_size} ids)",
            hint="logits can be compared only over one vocabulary: prepare the data with the teacher's tokenizer",
        )
    with_vocab(teacher.model, tokenizer, f"teacher {teacher.path}")
    check_model(config, teacher.model, f"teacher {teacher.path}", beside=True)


def check_padding(padded_size: int, tp: int, key: str = "parallel.tp") -> None:
    if padded_size % tp:
        raise ConfigError(
            f"the padded vocabulary of {padded_size} columns does not divide over {key} = {tp} ranks",
            hint=f"choose a power of two for {key}",
        )
