"""Checkpoints with something planted in them: what a stranger could send."""

import json
import os
import pathlib
import pickle

import torch

from megakd.checkpoints.record import describe_files, write_record
from megakd.checkpoints.torch_dist_reader import TorchDistReader


class Plant:
    """Unpickled, it runs a command that leaves a file."""

    def __init__(self, marker: pathlib.Path):
        self.command = f"touch {marker}"

    def __reduce__(self):
        return os.system, (self.command,)


def in_metadata(folder: pathlib.Path, marker: pathlib.Path) -> str:
    (folder / ".metadata").write_bytes(pickle.dumps(Plant(marker)))
    return ".metadata"


def in_common(folder: pathlib.Path, marker: pathlib.Path) -> str:
    torch.save({"progress": Plant(marker), "layout": {}}, folder / "common.pt")
    return "common.pt"


def in_object(folder: pathlib.Path, marker: pathlib.Path) -> str:
    """A random state, read by a run that continues."""
    key = next(key for key in TorchDistReader(folder).objects if key.startswith("random/"))
    return replace(folder, key, [Plant(marker)])


def in_tensor(folder: pathlib.Path, marker: pathlib.Path) -> str:
    return replace(folder, "decoder.final_layernorm.weight", Plant(marker))


def replace(folder: pathlib.Path, key: str, value) -> str:
    """Put another value at the place of one, at the end of its file; returns the file's name."""
    description = pickle.loads((folder / ".metadata").read_bytes())
    index = next(index for index in description.storage_data if index.fqn == key)
    info = description.storage_data[index]
    with open(folder / info.relative_path, "ab") as file:
        start = file.tell()
        torch.save(value, file)
        file.write(bytes(1 << 12))  # the part's length is checked before the part is read
        description.storage_data[index] = type(info)(info.relative_path, start, file.tell() - (1 << 12) - start)
    (folder / ".metadata").write_bytes(pickle.dumps(description))
    return info.relative_path


def edit_description(folder: pathlib.Path, edit) -> None:
    """Change the description of a folder that nobody has tampered with yet."""
    description = pickle.loads((folder / ".metadata").read_bytes())
    edit(description)
    (folder / ".metadata").write_bytes(pickle.dumps(description))
    record_files(folder)


def record_files(folder: pathlib.Path) -> None:
    """Let megakd.json list the files as they are now, with their digests: who plants something can do that."""
    edit_record(folder, lambda record: record.update(describe_files(folder, {})))


def edit_record(folder: pathlib.Path, edit) -> None:
    """Change megakd.json, and seal it again."""
    record = json.loads((folder / "megakd.json").read_text())
    edit(record)
    write_record(folder, record)


PLANTS = {"metadata": in_metadata, "common": in_common, "object": in_object, "tensor": in_tensor}


def plant(kind: str, folder: pathlib.Path, marker: pathlib.Path) -> str:
    """Returns the name of the file that holds it."""
    name = PLANTS[kind](folder, marker)
    record_files(folder)
    return name
