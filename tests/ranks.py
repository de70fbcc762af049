"""Run a function on n CPU ranks joined by gloo, started once per world size and session; raise if any of them fails."""

import contextlib
import ctypes
import gc
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import wait

from megakd.processes import PR_SET_PDEATHSIG

START_SECONDS = 120
STRAGGLER_SECONDS = 5  # how long the others have to answer after one rank has failed
MOST_THREADS = 100  # a pool with more is ended, and the next call starts a new one
_POOLS: dict[int, "_Pool"] = {}


def run_ranks(n, fn, *args, timeout_seconds=120):
    """Calls fn(rank, n, *args) on ranks 0 … n-1 and returns the list of what they return.

    `fn` must be a module-level function, and everything sent either way picklable. The ranks live on between calls with
    the default process group up, so `fn` must leave no state behind. A failure raises here with the traceback of the
    first failing rank; it or a hang ends all ranks of this world size, and the next call starts new ones.
    """
    pool = _POOLS.get(n)
    if pool is None:
        pool = _POOLS[n] = _Pool(n)
    try:
        answers = pool.run(fn, args, timeout_seconds)
    except BaseException:
        _POOLS.pop(n).kill()
        raise
    if pool.threads() > MOST_THREADS:
        _POOLS.pop(n).close()
    return answers


def forkserver():
    """Processes that begin with tests/imported.py done, which takes seven seconds, once a session."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.imported"])
    return context


def close_pools():
    """Ends all ranks; called when the test session ends."""
    while _POOLS:
        _POOLS.popitem()[1].close()


class _Pool:
    def __init__(self, n):
        context = forkserver()
        self.folder = tempfile.mkdtemp(prefix="megakd-ranks-")
        self.pipes, self.processes, self.started = [], [], False
        for rank in range(n):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, n, f"{self.folder}/store", theirs))
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def threads(self):
        """Of rank 0: one of three that a group has wakes a hundred times a second."""
        task = f"/proc/{self.processes[0].pid}/task"
        return len(os.listdir(task)) if os.path.isdir(task) else 0

    def run(self, fn, args, timeout_seconds):
        if not self.started:
            self.collect(START_SECONDS)
            self.started = True
        call = pickle.dumps((fn, args))
        self.signal(signal.SIGCONT)
        for pipe in self.pipes:
            pipe.send_bytes(call)
        answers = self.collect(timeout_seconds)
        self.signal(signal.SIGSTOP)  # threads of gloo that wait for nothing took half of two cores from the other tests
        return answers

    def signal(self, number):
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):  # it has died
                os.kill(process.pid, number)

    def collect(self, timeout_seconds):
        waiting, results, failures = dict(zip(self.pipes, range(len(self.pipes)), strict=True)), {}, {}
        deadline = time.monotonic() + timeout_seconds
        while waiting:
            ready = wait(list(waiting), timeout=max(0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    failed, result = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    failed, result = True, "the process died"
                if failed and not failures:
                    deadline = min(deadline, time.monotonic() + STRAGGLER_SECONDS)
                (failures if failed else results)[rank] = result
        if failures:
            rank, text = next(iter(failures.items()))
            raise RuntimeError(
                f"rank {rank} of {len(self.pipes)} failed (ranks that failed: {sorted(failures)}):\n{text}"
            )
        if waiting:
            raise TimeoutError(f"ranks {sorted(waiting.values())} did not answer within {timeout_seconds} seconds")
        return [results[rank] for rank in range(len(self.pipes))]

    def kill(self):
        for process in self.processes:
            process.kill()
        self.close()

    def close(self):
        self.signal(signal.SIGCONT)
        for pipe in self.pipes:
            pipe.close()  # a rank that waits for its next call sees this and leaves
        for process in self.processes:
            process.join(10)
            if process.exitcode is None:
                process.kill()
                process.join()
        shutil.rmtree(self.folder, ignore_errors=True)


def _serve(rank, n, store, pipe):
    # One that is stopped would not see its pipe end; the server that it is forked from ends with the tests.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    launch = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_PORT": 1}
    os.environ.update(
        {name: str(value) for name, value in launch.items()}, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo"
    )
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=n)
    pipe.send_bytes(pickle.dumps((False, "started")))
    modules = len(sys.modules)
    while True:
        try:
            call = pipe.recv_bytes()
        except EOFError:
            break
        try:
            fn, args = pickle.loads(call)
            answer = pickle.dumps((False, fn(rank, n, *args)))
        except BaseException:
            answer = pickle.dumps((True, traceback.format_exc()))
        modules = _let_go(modules)
        pipe.send_bytes(answer)
    dist.destroy_process_group()


def _let_go(known):
    """Empties the data-parallel wrappers that a call has left, so that the groups they hold end with their threads.

    Their backward hooks are held by autograd's nodes, in C++, and hold the wrapper: a circle that the collector cannot
    see. Gloo wakes each group's threads a hundred times a second, which chokes two cores after some tens of layouts.
    Args:
        known: how many modules there were the last time.
    Returns:
        how many there are.
    """
    wrapper = sys.modules.get("megatron.core.distributed.distributed_data_parallel")
    if wrapper is None:
        return known
    for ddp in [o for o in gc.get_objects() if type(o) is wrapper.DistributedDataParallel]:
        vars(ddp).clear()
    gc.collect()
    if len(sys.modules) > known:
        gc.freeze()
    return len(sys.modules)
