"""What Megatron's distributed loading asks for, read by megakd's own reader: Megatron and torch open none of the files.

Their loaders unpickle whatever `.metadata` and the objects in .distcp files name, which runs a stranger's code. So
`dist_checkpointing.load` is given strategies of ours for both parts of a checkpoint, and works out only who reads what.
"""

import pathlib

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.base import LoadCommonStrategy, LoadShardedStrategy
from torch import Tensor

from megakd.checkpoints.pickles import load_values
from megakd.checkpoints.record import Files, damaged
from megakd.checkpoints.torch_dist_reader import TorchDistReader
from megakd.digests import DamagedFile
from megakd.errors import CheckpointError
from megakd.limits import read_json

FORMAT_FILE, COMMON_FILE = "metadata.json", "common.pt"


def check_format(folder: pathlib.Path) -> None:
    """Raises CheckpointError unless the folder says that it is a torch_dist one."""
    path = folder / FORMAT_FILE
    try:
        said = read_json(path, CheckpointError)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}", hint="the checkpoint is damaged; copy it again"
        ) from error
    seen = said.get("sharded_backend") if isinstance(said, dict) else said
    if seen != "torch_dist" or said.keys() - _KNOWN or said.get("common_backend", "torch") != "torch":
        raise CheckpointError(f"{path} says {str(said)[:200]}; expected torch_dist", hint="other formats are not read")


_KNOWN = {"sharded_backend", "sharded_backend_version", "common_backend", "common_backend_version"}


def load_common(files: Files) -> dict:
    """The plain values of a checkpoint.

    Raises:
        DamagedCheckpointError: they are not those that were saved.
        CheckpointError: they cannot be read, or hold more than plain values.
    """
    path = files.folder / COMMON_FILE
    try:
        with files.open(COMMON_FILE) as file:
            values = load_values(file, path)
    except DamagedFile as error:
        raise damaged(error) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}", hint="copy the checkpoint again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no values by name", hint="copy the checkpoint again")
    return values


@torch.no_grad()
def read_shard(reader: TorchDistReader, part: ShardedTensor) -> Tensor:
    """A rank's part of a tensor, into `part.data` where that is there.

    Rows that the folder does not have (a vocabulary padded otherwise) are zeros, where the part allows that.

    Raises:
        CheckpointError: it is not there, of another shape, or cannot be read.
    """
    there = reader.entry(part.key).size
    if not part.allow_shape_mismatch and tuple(there) != tuple(part.global_shape):
        raise CheckpointError(
            f"{reader.folder}: {part.key} is {list(there)}, the model has {list(part.global_shape)}",
            hint="is it a checkpoint of this model, saved with the same optimizer settings?",
        )
    low = list(part.global_offset)
    sizes = [*[1] * part.prepend_axis_num, *part.local_shape]
    data = torch.empty(part.local_shape, dtype=part.dtype) if part.data is None else part.data.detach()
    target = data[(None,) * part.prepend_axis_num]
    if part.allow_shape_mismatch:
        target.zero_()
        sizes = [max(0, min(size, end - a)) for size, end, a in zip(sizes, there, low, strict=True)]
    if all(sizes):
        target[tuple(slice(size) for size in sizes)].copy_(reader.read_slice(part.key, low, sizes))
    return data


class Sharded(LoadShardedStrategy):
    """Tensors and objects of a torch_dist folder, for one rank.

    Collectives: `load` gathers a short text from all ranks, so that they fail together.
    """

    can_handle_sharded_objects = True

    def __init__(self, files: Files):
        super().__init__()
        self.files, self.reader = files, None

    def load(self, sharded_state_dict: dict, checkpoint_dir) -> dict:
        failure, loaded = None, {}
        try:
            self.reader = self.reader or TorchDistReader(self.files.folder, self.files)
            loaded = dict_list_map_outplace(self._read, sharded_state_dict)
        except CheckpointError as error:
            failure = error
        fail_together(failure)
        return loaded

    def _read(self, part: ShardedTensor | ShardedObject):
        if isinstance(part, ShardedTensor):
            return read_shard(self.reader, part)
        value = self.reader.read_object(part.unique_key)
        if not isinstance(value, list) or len(value) != 1:
            raise CheckpointError(
                f"{self.reader.folder}: {part.unique_key} is no object that Megatron saved", hint="copy it again"
            )
        return value[0]

    def load_tensors_metadata(self, checkpoint_dir):
        raise NotImplementedError("megakd compares shapes when it reads")

    def check_backend_compatibility(self, loaded_backend) -> None: ...

    def check_version_compatibility(self, loaded_version) -> None: ...


class Common(LoadCommonStrategy):
    """The plain values of a torch_dist folder.

    Collectives: as Sharded.
    """

    def __init__(self, files: Files):
        super().__init__()
        self.files = files

    def load_common(self, checkpoint_dir) -> dict:
        failure, values = None, {}
        try:
            values = load_common(self.files)
        except CheckpointError as error:
            failure = error
        fail_together(failure)
        return values

    def load_sharded_objects(self, sharded_objects_state_dict, checkpoint_dir):
        raise NotImplementedError("objects are in the .distcp files")

    def check_backend_compatibility(self, loaded_backend) -> None: ...

    def check_version_compatibility(self, loaded_version) -> None: ...


def fail_together(failure: CheckpointError | None) -> None:
    """Raise on every rank if any rank failed.

    Collectives: one all-gather of a short text and hint.
    """
    said = [None] * dist.get_world_size()
    dist.all_gather_object(said, None if failure is None else (type(failure), failure.args[0], failure.hint))
    if failure is not None:
        raise failure
    for rank, text in enumerate(said):
        if text is not None:
            kind, message, hint = text
            raise kind(f"rank {rank}: {message}", hint=hint)
