"""Megatron's torch_dist files, written by threads of the rank itself.

Megatron's own writer starts processes for every save, a synchronous one too: a Manager that lives as long as the rank,
and forked writers. A signal to the process group kills the Manager, after which no save succeeds; a forked writer that
outlives a killed rank keeps its sockets and locks. Planning, metadata and format here are Megatron's and torch's; only
the bytes take another way. Threads lose nothing to processes: writing and syncing a file both release the interpreter.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.state_dict_saver import (
    save_state_dict_async_finalize,
    save_state_dict_async_plan,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import WRAPPED_EXCEPTION, _wrap_exception
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megakd.digests import DigestingFile, FileDigests

FILES = 2  # a rank's share is written as so many files at a time


def plan_save(shards: ShardedStateDict, path, group, *, copy: bool) -> tuple["ThreadedWriter", Callable[[], None]]:
    """Divide a save among the ranks that hold the same, and plan each one's files.

    Args:
        shards: a sharded state dict without factories and plain values.
        path: of the folder.
        group: data-parallel ranks, which share the work.
        copy: the writer works on a copy in host memory, so that training may change the state before it is written.
    Returns:
        the writer of this rank's files, and what makes a checkpoint of all ranks' when they are written.
    Collectives: planning gathers the ranks' plans on rank 0; so does the second function their results.
    """
    megatron = TorchDistSaveShardedStrategy("torch_dist", 1)
    FullyParallelSaveStrategyWrapper(megatron, group).apply_saving_parallelization(shards)
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(shards, megatron.keep_only_main_replica)
    writer = ThreadedWriter(path, copy=copy)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    planned, *_ = save_state_dict_async_plan(mcore_to_pyt_state_dict(by_key), writer, planner=planner)
    return writer, lambda: save_state_dict_async_finalize(*planned)


class ThreadedWriter(FileSystemWriter):
    """What Megatron's planning asks of a writer, and the writing itself.

    Args:
        path: the folder.
        copy: see plan_save.
    Attributes:
        written: digests of this rank's files by name, made while they were written.
    """

    can_run_decentralized_global_plan = True  # the plans are gathered for the metadata, and not sent back

    def __init__(self, path, *, copy: bool):
        super().__init__(path)
        self.copy = copy
        self.files: list[list[tuple[WriteItem, object]]] = []
        self.prefix = ""
        self.results: list[WriteResult] | WRAPPED_EXCEPTION = []
        self.written: dict[str, FileDigests] = {}

    def prepare_decentralized_global_plan(self, plan: SavePlan) -> SavePlan:
        return dataclasses.replace(plan, storage_data=_StoragePrefix(f"__{dist.get_rank()}_"))

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Divide the plan's items among the files, the largest first; copy them if asked to."""
        self.prefix = plan.storage_data.prefix
        sized = [(item, planner.resolve_data(item)) for item in plan.items]
        sized.sort(key=lambda pair: size_bytes(pair[1]), reverse=True)
        files, filled_bytes = [[] for _ in range(FILES)], [0] * FILES
        for item, data in sized:
            emptiest = filled_bytes.index(min(filled_bytes))
            filled_bytes[emptiest] += size_bytes(data)
            files[emptiest].append((item, on_host(data, copy=True) if self.copy else data))
        self.files = [file for file in files if file]

    def write(self) -> None:
        """Write and sync all files; what goes wrong is reported by retrieve_write_results."""
        try:
            with ThreadPoolExecutor(FILES, "megakd-save") as threads:
                written = list(threads.map(self.write_file, range(len(self.files)), self.files))
            self.results = [result for results in written for result in results]
        except Exception as error:
            self.results = _wrap_exception(error)
        self.files = []  # the copies

    def write_file(self, number: int, items: list[tuple[WriteItem, object]]) -> list[WriteResult]:
        name = f"{self.prefix}{number}{DEFAULT_SUFFIX}"
        results = []
        with DigestingFile(pathlib.Path(self.path) / name) as stream:
            for item, data in items:
                start = stream.tell()
                if item.type == WriteItemType.BYTE_IO:
                    stream.write(data.getbuffer())
                else:
                    torch.save(on_host(data), stream)
                length = stream.tell() - start
                results.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))
            stream.sync()
        self.written[name] = stream.digester.digests()
        return results

    def storage_meta(self) -> None:
        """Nothing of where the folder was on this machine goes into it."""

    def retrieve_write_results(self) -> list[WriteResult] | WRAPPED_EXCEPTION:
        return self.results


def size_bytes(data) -> int:
    """Of a tensor or an io.BytesIO."""
    return data.nbytes if isinstance(data, Tensor) else data.getbuffer().nbytes


def on_host(data, *, copy: bool = False):
    """A tensor in host memory whose storage is no larger than it (torch.save writes whole storages); BytesIO as it is.

    Args:
        copy: never the tensor that was given, which is about to change.
    """
    if not isinstance(data, Tensor):
        return data
    data = data.detach()
    on_host = data.cpu()
    moved = on_host.data_ptr() != data.data_ptr()
    is_view = on_host.untyped_storage().nbytes() != on_host.nbytes
    return on_host.clone() if is_view or (copy and not moved) else on_host
