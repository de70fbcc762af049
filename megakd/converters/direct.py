"""Paths that a user gives where a checkpoint is wanted: a checkpoint, a run folder or a Hugging Face folder.

The last is converted once, into a folder beside it that is named by its content.
"""

import contextlib
import hashlib
import logging
import pathlib

from megakd.checkpoints import folder
from megakd.config import Model
from megakd.converters.convert import Options, convert
from megakd.converters.families import family_of, model_section
from megakd.converters.huggingface.folder import CONFIG, HuggingFaceFolder, is_hf_folder, read_json
from megakd.converters.huggingface.safetensors_files import SafetensorsReader
from megakd.digests import Verify
from megakd.errors import CheckpointError
from megakd.ownership import owning

LOG = logging.getLogger("megakd")
SAMPLE_BYTES = 4096


def open_checkpoint(path, verify: Verify = "always", *, progress: bool = False) -> folder.Checkpoint:
    """What the checkpoint says of itself that a path stands for.

    Args:
        verify: as of `megakd.checkpoints.folder.read_checkpoint`.
        progress: bars of a conversion.
    Raises:
        CheckpointError: as `find_checkpoint` and `megakd.checkpoints.folder.read_checkpoint`.
    """
    return folder.read_checkpoint(find_checkpoint(path, progress=progress), verify)


def section_of(path) -> Model:
    """The model section of what a path stands for, without converting or reading any weights: of a Hugging Face folder
    its config.json alone is needed.

    Raises:
        CheckpointError: there is none, or Megatron cannot express it.
    """
    path = pathlib.Path(path)
    if is_hf_folder(path) and not is_known(path):
        return model_section(family_of(read_json(path / CONFIG), path), path)
    return folder.read_checkpoint(folder.last_checkpoint(path), "never").model


def is_known(path: pathlib.Path) -> bool:
    """Whether it is a checkpoint or a run of megakd, whatever else lies in it."""
    return (path / folder.RECORD).is_file() or (path / "checkpoints").is_dir()


def find_checkpoint(path, *, progress: bool = False) -> pathlib.Path:
    """A checkpoint folder as it is; of a run folder, its last whole one; of a Hugging Face folder, its conversion.

    Raises:
        CheckpointError: there is none.
    """
    path = pathlib.Path(path)
    if is_hf_folder(path) and not is_known(path):
        return converted(path, progress=progress)
    return folder.last_checkpoint(path)


def converted(path: pathlib.Path, *, progress: bool = False) -> pathlib.Path:
    """The megakd checkpoint of a Hugging Face folder, made (and verified) if it is not there.

    Any number of processes may call it at once; one converts, the others wait for it.

    Raises:
        CheckpointError: the folder cannot be converted, or nothing can be written beside it.
    """
    target = path.with_name(f"{path.name}.megakd-{content_key(path)}")
    if is_whole(target):
        LOG.debug("%s was converted before: using %s", path, target)
        return target
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(owning(target.with_name(target.name + ".lock"), wait=True, remove=True))
        except OSError as error:
            raise CheckpointError(
                f"{path} is a Hugging Face folder, and its conversion cannot be written beside it: {error.strerror}",
                hint=f"convert it yourself: `megakd convert --from {path} --to CHECKPOINT`, and use CHECKPOINT",
            ) from error
        if not is_whole(target):  # another process may have made it meanwhile
            LOG.info(
                "%s is a Hugging Face folder: converting it once, to %s (large models are better converted before the "
                "launch: `megakd convert --from %s --to CHECKPOINT`, and CHECKPOINT instead of the folder)",
                path, target, path,
            )  # fmt: skip
            convert(path, target, "megatron", Options(progress=progress))
    return target


def is_whole(target: pathlib.Path) -> bool:
    return (target / folder.RECORD).is_file()


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
