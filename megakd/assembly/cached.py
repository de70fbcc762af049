"""The cached teacher of a run: a cache opened, and refused where it was not recorded for this run."""

from megakd.cache import CacheReader, check_identity
from megakd.cache.fingerprint import folder_fingerprint
from megakd.checkpoints.folder import Checkpoint
from megakd.config import Config, Model
from megakd.errors import CacheError, ConfigError


def open_caches(config: Config, tokenizer, student: Model, teacher_from: Checkpoint | None) -> list[CacheReader]:
    """Open every folder of teacher.cache for loss.temperature and loss.top_k; none without a recorded teacher.

    Args:
        tokenizer: of the data.
        student: its section with the real vocabulary.
        teacher_from: teacher.checkpoint where it is given too.
    Raises:
        CacheError: one is missing, damaged or unfinished, or was recorded for another tokenizer, vocabulary, teacher,
            sequence length, temperature or number of entries; they do not go together.
        ConfigError: the loss cannot be taken of what it holds.
    """
    if config.teacher is None:
        return []
    readers = [open_cache(config, folder, tokenizer, student, teacher_from) for folder in config.teacher.caches]
    for other in readers[1:]:
        for name, what in (("vocab_size", "a vocabulary of"), ("sampled", "draws:")):
            seen = [getattr(reader.header.contents, name) for reader in (readers[0], other)]
            if seen[0] != seen[1]:
                raise CacheError(
                    f"{readers[0].folder} holds {what} {seen[0]}, {other.folder} {what} {seen[1]}",
                    hint="caches of one run hold the same kind of entries, of one vocabulary; record one of them again",
                )
    return readers


def open_cache(config: Config, folder: str, tokenizer, student: Model, teacher_from: Checkpoint | None) -> CacheReader:
    """One of them; as `open_caches`."""
    loss = config.loss
    reader = CacheReader(
        folder, temperature=loss.temperature, top_k=loss.top_k, check_all=config.teacher.cache_checks == "always"
    )
    check_identity(
        folder,
        reader.header,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=student.vocab_size,
        teacher_fingerprint=folder_fingerprint(teacher_from.path) if teacher_from else None,
    )
    length, recordings = config.data.sequence_length, reader.header.recordings()
    lengths = {recording["sequence_length"] for recording in recordings if "sequence_length" in recording}
    if lengths and length not in lengths:
        raise CacheError(
            f"{folder} was recorded with sequences of {' and '.join(map(str, sorted(lengths)))} tokens, "
            f"data.sequence_length is {length}",
            hint="running text that is cut elsewhere is other samples: set data.sequence_length, or record again",
        )
    if reader.header.contents.sampled and loss.divergence != "forward_kl":
        raise ConfigError(
            f"loss.divergence is {loss.divergence}, but {folder} holds draws, which give forward_kl only",
            hint="set loss.divergence=forward_kl, or record with cache.mode=top_k",
        )
    return reader
