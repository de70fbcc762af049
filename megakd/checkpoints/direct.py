"""A Hugging Face folder used as a checkpoint: converted once, into a folder beside it that is named by its content."""

import fcntl
import hashlib
import logging
import pathlib

from megakd.checkpoints import folder
from megakd.checkpoints.conversion import Options, convert
from megakd.checkpoints.hf_folder import CONFIG, HuggingFaceFolder
from megakd.checkpoints.safetensors_files import SafetensorsReader
from megakd.errors import CheckpointError

LOG = logging.getLogger("megakd")
SAMPLE_BYTES = 4096


def converted(path: pathlib.Path) -> pathlib.Path:
    """The megakd checkpoint of a Hugging Face folder, made (and verified) if it is not there.

    Any number of processes may call it at once; one converts, the others wait for it.

    Raises:
        CheckpointError: the folder cannot be converted, or nothing can be written beside it.
    """
    target = path.with_name(f"{path.name}.megakd-{content_key(path)}")
    try:
        lock = open(target.with_name(target.name + ".lock"), "w")  # noqa: SIM115 closed below
    except OSError as error:
        raise CheckpointError(
            f"{path} is a Hugging Face folder, and its conversion cannot be written beside it: {error.strerror}",
            hint=f"convert it yourself: `megakd convert --from {path} --to CHECKPOINT`, and use CHECKPOINT",
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / folder.RECORD).is_file():
            LOG.warning("%s is a Hugging Face folder: converting it once, to %s", path, target)
            convert(path, target, "megatron", Options())
        else:
            LOG.info("%s was converted before: using %s", path, target)
    return target


def content_key(path: pathlib.Path) -> str:
    """Twelve hexadecimal digits that change with config, tokenizer, tensor names, shapes and types, or any tensor's
    first, middle or last 4 KiB. Reading all of a large checkpoint on every start would take minutes.
    """
    source = HuggingFaceFolder(path)
    digest = hashlib.sha256()
    for file in [path / CONFIG, *source.tokenizer_files(), *source.other_files()]:
        digest.update(f"{file.name} {file.stat().st_size} ".encode() + file.read_bytes())
    for reader in source.readers:
        digest.update(reader.path.name.encode())
        if not isinstance(reader, SafetensorsReader):
            digest.update(hashlib.file_digest(open(reader.path, "rb"), "sha256").digest())  # noqa: SIM115
            continue
        digest.update(reader.header.encode())
        with open(reader.path, "rb") as file:
            for entry in reader.entries.values():
                low, high = (reader.start + offset for offset in entry["data_offsets"])
                for start in (low, (low + high) // 2, max(low, high - SAMPLE_BYTES)):
                    file.seek(start)
                    digest.update(file.read(min(SAMPLE_BYTES, high - start)))
    return digest.hexdigest()[:12]
