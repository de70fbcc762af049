"""The `.metadata` of a torch_dist folder, a pickle, read so that nothing in it can run.

Every name in it is compared with one list, and the classes on that list are replaced by inert ones that only hold what
they are given: not even one of them is ever built from a stranger's values.
"""

import io
import os
import pickle
from typing import BinaryIO

import torch

from megakd.checkpoints.pickles import DAMAGE, buffered, refuse
from megakd.checkpoints.record import damaged
from megakd.digests import DamagedFile
from megakd.errors import CheckpointError
from megakd.limits import check_limit

METADATA_NAMES = frozenset(
    [
        *(
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
                "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
            )
        ),
        *(
            ("torch.distributed.checkpoint.planner", name)
            for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
        ),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("pathlib", "PosixPath"),  # where torch's own writer put the folder
        ("pathlib._local", "PosixPath"),
        ("torch", "Size"),
        ("collections", "OrderedDict"),
    ]
)  # fmt: skip


class Inert:
    """Stands for a class of `.metadata`: holds what it is given, does nothing."""

    def __new__(cls, *arguments):
        made = super().__new__(cls)
        made.state = {}
        return made

    def __init__(self, *arguments): ...

    def __setstate__(self, state):
        self.state = state


class MetadataUnpickler(pickle.Unpickler):
    """Reads `.metadata` with Inert classes in place of those it names.

    Args:
        where: for errors.
    """

    def __init__(self, file: BinaryIO, where):
        super().__init__(file)
        self.where, self.made = where, {}

    def find_class(self, module: str, name: str):
        if module == "torch" and isinstance(value := getattr(torch, name, None), torch.dtype):
            return value
        if (module, name) not in METADATA_NAMES:
            raise refuse(self.where, module, name)
        if (module, name) not in self.made:  # made for this file alone: it can change them without harm
            plain = {"Size": tuple, "OrderedDict": dict, "_get_layout": lambda layout: layout}
            self.made[module, name] = plain.get(name) or type(name, (Inert,), {})
        return self.made[module, name]


def load_metadata(file: io.RawIOBase, where) -> Inert:
    """The description of a torch_dist folder, in Inert objects.

    Raises:
        DamagedCheckpointError: the file does not hold what was saved.
        CheckpointError: it is no description, or names a class that is not on the list.
    """
    try:
        check_limit("PICKLE_BYTES", file.seek(0, os.SEEK_END), where, CheckpointError)
        file.seek(0)
        with buffered(file) as reader:
            return MetadataUnpickler(reader, where).load()
    except DamagedFile as error:
        raise damaged(error) from error
    except (*DAMAGE, RecursionError) as error:
        raise CheckpointError(
            f"{where} cannot be read: {type(error).__name__}: {str(error)[:300]}",
            hint="the folder is no torch_dist checkpoint, or it is damaged; copy it again",
        ) from error
