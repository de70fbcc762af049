"""Save and load through Megatron's distributed checkpoints: any layout writes, any layout reads."""

import errno
import pathlib
import threading
from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from torch.distributed.checkpoint.api import CheckpointException

from megakd.checkpoints import folder
from megakd.checkpoints.folder import Checkpoint
from megakd.checkpoints.loading import COMMON_FILE, check_format, load_common, load_sharded
from megakd.checkpoints.pieces import describe_pieces, is_piece
from megakd.checkpoints.writer import plan_save
from megakd.digests import DigestingFile, FileDigests
from megakd.errors import CheckpointError
from megakd.models.sharding import is_sharded

# Megatron, torch and the operating system each report a failed save or load in their own way; torch's is a
# BaseException, which `except Exception` misses.
FAILURES = (
    CheckpointException,
    RuntimeError,
    OSError,
    KeyError,
    ValueError,
    CheckpointingException,
)


FOREIGN_CHARACTERS = 300
TORCH_ADVICE = ". This file can still be loaded"  # by running what torch has just refused to run


def sharding_metadata(groups) -> dict:
    """How models and optimizers describe their shards: `fully_reshardable` survives every change of layout."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": groups.dp_cp,
    }


def describe_weights(gpt, groups, *, in_place: bool = False) -> dict:
    """The sharded weights of a model; of several virtual stages, each one's under its number.

    Args:
        in_place: what FSDP shards is described as it is kept, in float32, and not in the type that is saved.
    """
    metadata = sharding_metadata(groups)
    if is_sharded(gpt):
        return describe_pieces(gpt, metadata, None if in_place else gpt.config.params_dtype)
    parts = {str(i): chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(gpt.chunks)}
    return parts if len(parts) > 1 else parts["0"]


@torch.no_grad()
def set_weights(gpt, weights: dict, described: dict) -> None:
    """Give a model what `describe_weights` described (in place), once it is read."""
    if is_sharded(gpt):
        own = {name: part.data for name, part in described.items() if is_piece(part)}
        for name, part in own.items():
            part.copy_(weights[name])
        gpt.load_state_dict({name: value for name, value in weights.items() if name not in own}, strict=False)
        return
    for i, chunk in enumerate(gpt.chunks):
        chunk.load_state_dict(weights if len(gpt.chunks) == 1 else weights[str(i)])


def save(
    path: pathlib.Path,
    state: dict,
    groups,
    publish: Callable[[dict[str, FileDigests]], None],
    *,
    asynchronous: bool = False,
):
    """Write a sharded state and publish the folder.

    Args:
        path: the final folder; until it is whole it is called `path.incomplete`.
        state: Megatron sharded state dict, with whatever plain values belong to it.
        publish: completes and renames the folder, given the digests of the ranks' files by name; called on rank 0 when
            every rank has written.
        asynchronous: return when the state has been copied to host memory, and let a thread write the copy.
    Returns:
        None, or the save under way; `publish` is then called when it is completed.
    Raises:
        CheckpointError: on every rank; the incomplete folder is removed.
    Collectives: barriers, metadata exchange; all ranks call it.
    """
    rank_0 = dist.get_rank() == 0
    failure, plain_digests = None, {}
    try:
        if rank_0:
            folder.begin(path)
    except OSError as error:
        failure = error
    raise_together(path, failure)
    try:
        shards, plain = save_preprocess(state)
        if rank_0:
            plain_digests = write_plain(folder.incomplete(path), plain)
        writer, describe = plan_save(shards, folder.incomplete(path), groups.dp_cp, copy=asynchronous)
        if not asynchronous:
            writer.write()
            describe()
    except FAILURES as error:
        # No collective here: Megatron may have failed on this rank alone, with the others waiting inside it. Those end
        # with the launch (megakd.ranks.failure).
        if rank_0:
            folder.discard(path)
        raise save_error(path, f"rank {dist.get_rank()}: {in_words(error)}") from error

    def finish():
        failure, written = None, gather_together(path, None, plain_digests | writer.written)
        try:
            if rank_0:
                save_config(CheckpointingConfig("torch_dist"), str(folder.incomplete(path)))
                publish({name: digests for part in written for name, digests in part.items()})
        except OSError as error:
            failure = error
        raise_together(path, failure)

    if not asynchronous:
        return finish()
    return PendingSave(path, writer.write, [describe, finish])


def write_plain(folder: pathlib.Path, values: dict) -> dict[str, FileDigests]:
    """The values that are no shards, in a file of their own: every version of Megatron-Core reads that."""
    with DigestingFile(folder / COMMON_FILE) as file:
        torch.save(values, file)
        file.sync()
    return {COMMON_FILE: file.digester.digests()}


class PendingSave:
    """A save whose files a thread of this rank is writing.

    Args:
        path: the final folder.
        write: writes this rank's files.
        complete: make a checkpoint of what all ranks have written; collective.
    """

    def __init__(self, path: pathlib.Path, write: Callable[[], None], complete: list[Callable[[], None]]):
        self.path, self._complete = path, complete
        self._thread = threading.Thread(target=write, name="megakd-save", daemon=True)
        self._thread.start()

    def is_written(self) -> bool:
        """Whether every rank has written its files.

        Collectives: one all-reduce of 4 bytes.
        """
        busy = torch.tensor(int(self._thread.is_alive()), dtype=torch.int32, device=torch.cuda.current_device())
        dist.all_reduce(busy)
        return not busy

    def complete(self) -> None:
        """Wait for this rank's files, and make a checkpoint of all ranks'.

        Raises:
            CheckpointError: on every rank; the incomplete folder is removed.
        Collectives: metadata exchange, barriers; all ranks call it.
        """
        self._thread.join()
        try:
            for step in self._complete:
                step()
        except FAILURES as error:
            if dist.get_rank() == 0:
                folder.discard(self.path)
            raise save_error(self.path, f"in the background: {in_words(error)}") from error


def raise_together(path: pathlib.Path, failure: BaseException | None) -> None:
    """Raise on every rank if any rank failed, and leave nothing of the failed save behind.

    Collectives: as gather_together.
    """
    gather_together(path, failure, None)


def gather_together(path: pathlib.Path, failure: BaseException | None, own) -> list:
    """Every rank's `own`, in their order, unless one failed: then raise on all, and leave nothing of the save behind.

    Collectives: one all-gather of a short text and `own`.
    """
    both = [None] * dist.get_world_size()
    dist.all_gather_object(both, (None if failure is None else in_words(failure), own))
    failed = [(rank, text) for rank, (text, _) in enumerate(both) if text is not None]
    if not failed:
        return [value for _, value in both]
    if dist.get_rank() == 0:
        folder.discard(path)
    rank, text = failed[0]
    raise save_error(path, f"rank {rank}: {text}") from failure


def save_error(path: pathlib.Path, text: str) -> CheckpointError:
    full = f"Errno {errno.ENOSPC}" in text or "No space left" in text
    kept = "nothing of it was kept; the checkpoints before it are whole"
    hint = "the disk is full; free space or lower checkpoint.keep_last" if full else kept
    return CheckpointError(f"checkpoint {path} could not be saved: {text}", hint=hint)


def load(checkpoint: Checkpoint, state: dict, groups) -> dict:
    """Read what `state` describes from a checkpoint; what else the folder holds is left alone.

    Layers' extra states (scales of 8-bit training, which megakd does not do) are not read, and come back as None:
    Transformer Engine would unpickle them.

    Raises:
        DamagedCheckpointError: on every rank; what was read on one is not what was saved.
        CheckpointError: on every rank; a tensor is missing, has another shape, or cannot be read; a pickle names what
            it should not.
    """
    check_format(checkpoint.path)
    wanted = state | {"model": without_extra_states(state["model"])}
    try:
        loaded = load_sharded(wanted, checkpoint.files, groups.dp_cp)
    except FAILURES as error:
        raise CheckpointError(
            f"{checkpoint.path} could not be loaded: {in_words(error)}",
            hint="is it a checkpoint of this model, saved with the same optimizer settings?",
        ) from error
    return loaded | {"model": with_empty_states(loaded["model"], state["model"])}


def without_extra_states(weights: dict) -> dict:
    """Without those of the layers, at any depth."""
    return {
        name: without_extra_states(part) if isinstance(part, dict) else part
        for name, part in weights.items()
        if not name.endswith("_extra_state")
    }


def with_empty_states(loaded: dict, weights: dict) -> dict:
    """What was left out of `weights`, as None."""
    return {
        name: with_empty_states(loaded[name], part) if isinstance(part, dict) else loaded.get(name)
        for name, part in weights.items()
    }


def common_values(checkpoint: Checkpoint) -> dict:
    """The plain values that a checkpoint was saved with.

    Raises:
        CheckpointError: they cannot be read.
    """
    check_format(checkpoint.path)
    return load_common(checkpoint.files)


def in_words(error: BaseException) -> str:
    """An error of Megatron, torch or the system on one line, without tracebacks of other ranks and advice of theirs."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {in_words(cause)}"
    said = str(error).strip().partition("\n")[0].partition(TORCH_ADVICE)[0]
    return f"{type(error).__name__}: {said[:FOREIGN_CHARACTERS]}"


@torch.no_grad()
def load_weights(gpt, checkpoint: Checkpoint, groups) -> None:
    """Fill a model's parameters from a checkpoint of the same architecture saved under any layout.

    Vocabulary rows that the checkpoint does not have (another padding) load as zeros; the kernels leave them out.
    """
    state = describe_weights(gpt, groups, in_place=True)
    set_weights(gpt, load(checkpoint, {"model": state}, groups)["model"], state)
