"""The parity gate in processes of its own: `tp` ranks on this machine's CPU, whatever the caller runs on."""

import dataclasses
import multiprocessing
import os
import pathlib
import tempfile
import threading
from multiprocessing.connection import Connection, wait

from megakd.checkpoints.folder import Checkpoint
from megakd.checkpoints.record import unrecorded
from megakd.config import Model
from megakd.errors import CheckpointError

EXIT_SECONDS = 20  # for a rank that has answered to come to its end


def run_gate(hf_path: pathlib.Path, megatron_path: pathlib.Path, model: Model, *, tp: int = 1, progress: bool) -> dict:
    """Compare a Hugging Face folder with a torch_dist folder that need not be published yet.

    Returns:
        the record of the comparison, for the checkpoint that passed it.
    Raises:
        CheckpointError: they differ, or a process of the gate died.
    """
    check_layout(model, tp)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="megakd-gate-") as meeting:
        pipes, processes = [], []
        for rank in range(tp):
            ours, theirs = context.Pipe(duplex=False)
            args = (rank, tp, f"{meeting}/store", hf_path, megatron_path, model, progress, theirs)
            process = context.Process(target=serve, args=args, daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        results = [receive(pipe, process) for pipe, process in zip(pipes, processes, strict=True)]
        for process in processes:
            process.join(EXIT_SECONDS)
            process.kill()
            process.join()
    failures = [result for result in results if isinstance(result, BaseException)]
    if failures:
        raise next((f for f in failures if isinstance(f, CheckpointError)), failures[0])
    return results[0]


def check_layout(model: Model, tp: int) -> None:
    groups = model.num_query_groups or model.num_attention_heads
    for name, value in (("attention heads", model.num_attention_heads), ("query groups", groups)):
        if value % tp and (name == "attention heads" or tp % value):
            raise CheckpointError(f"--tp {tp} does not divide the model's {value} {name}", hint="choose a smaller --tp")


def receive(pipe: Connection, process) -> object:
    try:
        return pipe.recv()
    except EOFError:
        process.join()
        return CheckpointError(
            f"a process of the parity gate died (exit code {process.exitcode})",
            hint="exit code -9 is mostly a lack of memory; the gate needs two layers in float32",
        )


def serve(rank, tp, store, hf_path, megatron_path, model, progress, pipe) -> None:
    """One rank of the gate; sends Parity's record or the error."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // tp)))
    try:
        pipe.send(compare(rank, tp, store, hf_path, megatron_path, model, progress))
    except CheckpointError as error:
        pipe.send(CheckpointError(error.args[0], hint=error.hint))
    except Exception as error:  # sent to the caller, whose error it is
        pipe.send(RuntimeError(f"the parity gate failed on rank {rank}: {type(error).__name__}: {error}"))
    finally:
        pipe.close()


def end_with_parent() -> None:
    """A rank whose caller was killed goes too: nobody is left to hear its answer."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def compare(rank, tp, store, hf_path, megatron_path, model, progress) -> dict:
    from megakd.megatron_on_cpu import install

    install("cpu")
    import torch.distributed as dist

    from megakd.converters.parity.compare import check
    from megakd.models.groups import build_groups, destroy_groups

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=tp)
    try:
        groups = build_groups(tp, 1, seed=0)
        parity = check(hf_path, as_checkpoint(megatron_path, model), groups, progress=progress)
        destroy_groups()
    finally:
        dist.destroy_process_group()
    import transformers

    return dataclasses.asdict(parity) | {"transformers": transformers.__version__}


def as_checkpoint(path: pathlib.Path, model: Model) -> Checkpoint:
    """A checkpoint folder whose record has not been written yet."""
    return Checkpoint(path, model, 0, None, None, training=False, metrics={}, files=unrecorded(path))
