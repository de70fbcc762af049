"""Megatron's loading of torch_dist folders, from files whose digests are compared as they are read."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import BinaryIO

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import CachedMetadataFileSystemReader
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    TorchDistLoadShardedStrategy,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from megakd.checkpoints.record import Files


class VerifiedLoad(TorchDistLoadShardedStrategy):
    """Megatron's strategy for torch_dist with a reader of ours.

    Args:
        files: of the checkpoint.
    """

    def __init__(self, files: Files):
        super().__init__()
        self.files = files

    def load(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: pathlib.Path) -> dict:
        """The tensors and objects that a state dict describes.

        Collectives: torch's, which plan who reads what and gather failures: one rank's is raised on all.
        """
        parts = [part for part in nested_values(sharded_state_dict) if isinstance(part, ShardedTensor)]
        planner = MCoreLoadPlanner(
            shapes_validation_sharded_tensors=[part for part in parts if not part.allow_shape_mismatch],
            allow_shape_mismatch_sharded_tensors={part.key: part for part in parts if part.allow_shape_mismatch},
        )
        by_key, flat, renamed = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        state = mcore_to_pyt_state_dict(by_key, True)
        reader = CachedMetadataFileSystemReader(checkpoint_dir)
        reader.fs = VerifiedFiles(self.files)
        _load_state_dict(state, reader, planner=planner)  # load() would compare keys, which differ between stages
        self.cached_global_metadata = reader.read_metadata()
        loaded = {key: _unwrap_pyt_sharded_tensor(value) for key, value in state.items()}
        loaded = _replace_sharded_keys_with_state_dict_keys(loaded, flat, renamed)
        _restore_dict_types(loaded, sharded_state_dict)
        return loaded


class VerifiedFiles(FileSystem):
    """A checkpoint's files, for torch's reader."""

    def __init__(self, files: Files):
        self.files = files

    @contextlib.contextmanager
    def create_stream(self, path, mode: str) -> Iterator[BinaryIO]:
        assert mode == "rb", f"{path} is opened to {mode}"
        with self.files.open(str(pathlib.Path(path).relative_to(self.files.folder))) as file:
            yield file
