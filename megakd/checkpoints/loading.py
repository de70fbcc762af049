"""Distributed checkpoints, read by megakd's own reader: Megatron and torch open none of the files.

Their loaders unpickle whatever `.metadata` and the objects in .distcp files name, which runs a stranger's code.
Megatron only works out which rank reads what. The classes that it wants of a loader change with its versions (0.16
takes subclasses of an abstract one, which 0.19 does not have); the functions that are used here do not.
"""

import pathlib

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, merge
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.utils import extract_sharded_base, force_all_tensors_to_non_fp8
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity
from torch import Tensor

from megakd.checkpoints.pickles import load_values
from megakd.checkpoints.record import Files, damaged
from megakd.checkpoints.torch_dist_reader import TorchDistReader
from megakd.digests import DamagedFile
from megakd.errors import CheckpointError
from megakd.limits import read_json

FORMAT_FILE, COMMON_FILE = "metadata.json", "common.pt"
COMMON_OBJECT = ShardedObject("common_state", None, (1,), (0,)).unique_key


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


def load_sharded(state: dict, files: Files, group) -> dict:
    """Read what a sharded state describes, and the plain values that were saved beside it.

    Args:
        group: data-parallel ranks; they read a share each and exchange it, so that files are read once, not dp times.
    Raises:
        CheckpointError: on every rank.
    Collectives: exchange of descriptions and, within `group`, of tensors; all ranks call it.
    """
    force_all_tensors_to_non_fp8(state)
    shards, plain, factories = load_preprocess(state)
    failure, whole = None, {}
    try:
        whole = load_common(files)
    except CheckpointError as error:
        failure = error
    fail_together(failure)
    merge(whole, plain)
    shards, _ = extract_sharded_base(shards)
    validate_sharding_integrity(determine_global_metadata(shards)[1])
    strategy = Sharded(files)
    if group.size() > 1:
        strategy = FullyParallelLoadStrategyWrapper(strategy, group)
    merge(whole, strategy.load(shards, files.folder))
    return apply_factory_merges(whole, factories)


def load_common(files: Files) -> dict:
    """The plain values of a checkpoint: a file of their own, or an object among the shards (Megatron-Core 0.19).

    Raises:
        DamagedCheckpointError: they are not those that were saved.
        CheckpointError: they cannot be read, or hold more than plain values.
    """
    path = files.folder / COMMON_FILE
    try:
        if path.exists():
            with files.open(COMMON_FILE) as file:
                values = load_values(file, path)
        else:
            values = read_object(TorchDistReader(files.folder, files), COMMON_OBJECT)
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


def read_object(reader: TorchDistReader, key: str):
    """What Megatron saved as an object: a list with the one value in it."""
    value = reader.read_object(key)
    if not isinstance(value, list) or len(value) != 1:
        raise CheckpointError(f"{reader.folder}: {key} is no object that Megatron saved", hint="copy it again")
    return value[0]


class Sharded:
    """Tensors and objects of a torch_dist folder, for one rank.

    Collectives: `load` gathers a short text from all ranks, so that they fail together.
    """

    def __init__(self, files: Files):
        self.files, self.reader = files, None

    def load(self, sharded_state_dict: dict, checkpoint_dir, async_strategy=None) -> dict:
        """Megatron's wrapper calls it for a rank's share; the folder is `files.folder`, how one writes is no matter."""
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
        return read_object(self.reader, part.unique_key)


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
