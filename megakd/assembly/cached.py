"""The cached teacher of a run: a cache opened, and refused where it was not recorded for this run."""

import torch

from megakd.cache import CacheReader, Header, check_identity, read_header
from megakd.cache.fingerprint import folder_fingerprint
from megakd.checkpoints.folder import Checkpoint
from megakd.config import Config, Loss, Model
from megakd.errors import CacheError, ConfigError
from megakd.kernels import VocabShard
from megakd.teachers.cached import CachedTeacher
from megakd.teachers.recorded import RecordedTeacher


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
        for name, what in (("vocab_size", "a vocabulary of"), ("sampled", "draws:"), ("hidden_size", "hidden states:")):
            seen = [getattr(reader.header.contents, name) for reader in (readers[0], other)]
            if name == "hidden_size":  # teachers of several widths go together, states and entries do not
                seen = [size > 0 for size in seen]
            if seen[0] != seen[1]:
                raise CacheError(
                    f"{readers[0].folder} holds {what} {seen[0]}, {other.folder} {what} {seen[1]}",
                    hint="caches of one run hold the same kind of entries, of one vocabulary; record one of them again",
                )
    return readers


def open_cache(config: Config, folder: str, tokenizer, student: Model, teacher_from: Checkpoint | None) -> CacheReader:
    """One of them; as `open_caches`."""
    loss, header = config.loss, read_header(folder)
    if not header.contents.hidden_size:
        check_entries(folder, header, loss)
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
    return reader


def check_entries(folder: str, header: Header, loss: Loss) -> None:
    """Raises ConfigError where the loss cannot be taken of recorded entries."""
    if loss.targets != "top_k":
        raise ConfigError(
            f"loss.targets is {loss.targets}, but {folder} holds the entries of cache.mode={header.mode}, which say "
            "what is compared",
            hint="set loss.targets=top_k, or record with cache.mode=hidden, which holds the whole distribution",
        )
    if loss.ramps.temperature is not None:
        raise ConfigError(
            f"loss.ramps.temperature is given, but {folder} was recorded at fixed temperatures",
            hint="leave the ramp out, or record with cache.mode=hidden, which serves every temperature",
        )
    if header.contents.sampled and loss.divergence != "forward_kl":
        raise ConfigError(
            f"loss.divergence is {loss.divergence}, but {folder} holds draws, which give forward_kl only",
            hint="set loss.divergence=forward_kl, or record with cache.mode=top_k",
        )


def cached_teacher(
    readers: list[CacheReader], config: Config, groups, data: dict, shard: VocabShard, device: torch.device
) -> CachedTeacher:
    """The teacher that the caches hold.

    Args:
        readers: as `open_caches` gives them, at least one.
        groups, data: as of a cached teacher.
        shard, device: of the student.
    Raises:
        CacheError: a recorded output layer is missing or damaged.
    """
    if readers[0].header.contents.hidden_size:
        return RecordedTeacher(
            readers, groups, data, shard=shard, loss=config.loss, seed=config.run.seed, device=device
        )
    return CachedTeacher(readers, groups, data)
