"""What can be counted of the loss kernels without a GPU: launches, and the instructions of the compiled kernels.

    python tools/gpu/static_counts.py launches
    python tools/gpu/static_counts.py instructions --capability 90

`launches` runs the host's side of every function on tensors without content: how many kernels of Triton's and of
PyTorch's it starts on CUDA. A question to the device, which would make the host wait and keep a CUDA graph from being
captured, is an error. `instructions` compiles each kernel for a GPU that is not there: machine instructions in all, in
each loop (inner ones included; of a loop over tiles that is what a tile costs a warp), registers, spills, and shared
memory. None of it is a time.
"""

import argparse
import collections
import contextlib
import functools
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction, KernelInterface

sys.path[:0] = [str(pathlib.Path(__file__).parents[2])]

from megakd.divergences import DIVERGENCES  # noqa: E402
from megakd.kernels import (  # noqa: E402
    VocabShard,
    dense_kd_loss,
    kd_loss,
    linear_kd_loss,
    paths,
    sample_targets,
    select_top_k,
    selection_rows,
)
from megakd.kernels.predictions import predict  # noqa: E402
from megakd.kernels.sampling import sample_and_predict  # noqa: E402
from megakd.kernels.selection import select_and_predict  # noqa: E402
from megakd.targets import TeacherTargets  # noqa: E402

WAITS = {"_local_scalar_dense", "is_nonzero", "item", "nonzero", "masked_select", "bincount", "repeat_interleave",
         "_unique2", "unique_dim", "equal", "is_pinned"}  # fmt: skip
FREE = {"view", "_unsafe_view", "slice", "select", "t", "transpose", "permute", "unsqueeze", "squeeze", "expand",
        "detach", "alias", "as_strided", "unbind", "split", "split_with_sizes", "empty", "empty_like", "empty_strided",
        "new_empty", "new_empty_strided", "_assert_async"}  # fmt: skip


class HostWaitError(Exception):
    """An operation that cannot go on before the device has answered."""


class Launches(TorchDispatchMode):
    """Counts PyTorch's operations that launch, by name, and Triton's kernels, which are not run."""

    def __init__(self):
        super().__init__()
        self.aten, self.triton = collections.Counter(), collections.Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        masks = [x for x in arguments[1] or () if x is not None] if name.startswith("index") else []
        if name in WAITS or any(getattr(mask, "dtype", None) == torch.bool for mask in masks):
            raise HostWaitError(name)
        result = function(*arguments, **(options or {}))
        if name == "_to_copy" and result.device != arguments[0].device:
            raise HostWaitError(f"a copy from {arguments[0].device} to {result.device}")
        if name not in FREE:
            self.aten[name] += 1
        return result

    def launch(self, kernel, *arguments, **options) -> None:
        """Stands in for a launch of Triton's."""
        self.triton[kernel.__name__] += 1


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Tensors without content are taken for a GPU's: Triton's path, its blocks of rows, and draws of no generator."""
    rand = torch.rand
    with (
        mock.patch.object(paths, "choose", lambda _, plain, triton: paths._load(triton, "of static counts", 0)),
        mock.patch.dict(selection_rows.BLOCK_TOKENS, meta=selection_rows.BLOCK_TOKENS["cuda"]),
        mock.patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext()),  # knows no such device
        mock.patch.object(torch, "rand", lambda *size, generator, **named: rand(*size, **named)),
    ):
        yield


@contextlib.contextmanager
def counted() -> Iterator[Launches]:
    """What is called inside launches nothing; it is counted."""
    launches = Launches()
    with (
        on_meta(),
        mock.patch.object(KernelInterface, "__getitem__", lambda kernel, _: functools.partial(launches.launch, kernel)),
        launches,
    ):
        yield launches


class Rank(VocabShard):
    """The first of two ranks, in this process alone."""

    rank, ranks = 0, 2

    def __post_init__(self):
        pass

    def all_gather(self, mine):
        return mine.new_empty((2, *mine.shape))

    def start_sum_over_ranks(self, x_TH, *, scatter=False):
        return lambda: x_TH


def calls(width: int, top_k: int, temperature: float, ranks: int = 1) -> Iterator[tuple[str, Callable]]:
    """(name, function) of everything that reads logits."""
    shard = VocabShard(0, width, width) if ranks == 1 else Rank(0, width, 2 * width)
    with torch.device("meta"):
        student_TW, teacher_TW = torch.empty((2, 64, width), dtype=torch.bfloat16)
        labels_T, ones_T = torch.empty(64, dtype=torch.int64), torch.empty(64)
    given = top_k, shard, temperature
    yield "select_top_k", lambda: select_top_k(teacher_TW, *given)
    yield "select_and_predict, gathered", lambda: select_and_predict(teacher_TW, labels_T, *given, gather=True)
    yield "sample_targets", lambda: sample_targets(teacher_TW, top_k, shard, None, temperature)
    yield "sample_and_predict", lambda: sample_and_predict(teacher_TW, labels_T, top_k, shard, None, temperature)
    yield "predict", lambda: predict(teacher_TW, labels_T, shard)
    with counted():
        targets = select_top_k(teacher_TW, *given)
    yield "linear_kd_loss, all supervised, backward included", lambda: trained_head(targets, labels_T, shard)
    for name in DIVERGENCES:
        options = {"divergence": name, "ce_weight": 0.1, "inplace_backward": True}
        for form, taught in ((kd_loss, (targets,)), (dense_kd_loss, (teacher_TW,))):
            named = options | ({"temperature": temperature} if form is dense_kd_loss else {})

            def trained(form=form, taught=taught, named=named):
                leaf_TW = student_TW.detach().requires_grad_()
                form(leaf_TW, *taught, labels_T, shard, **named).loss_T.backward(ones_T)

            yield f"{form.__name__} {name}, backward included", trained


def trained_head(targets: TeacherTargets, labels_T: Tensor, shard: VocabShard) -> None:
    """The output layer and its loss as a run has them, in two blocks."""
    with torch.device("meta"):
        hidden_TH = torch.empty((len(labels_T), 8), dtype=torch.bfloat16, requires_grad=True)
        weight_WH = torch.empty((shard.stop - shard.start, 8), dtype=torch.bfloat16, requires_grad=True)
        weight_WH.main_grad = torch.empty(weight_WH.shape)
        ones_T = torch.ones(len(labels_T))
    how = {"all_supervised": True, "gradient_in_forward": True, "accumulate_into_main_grad": True}
    losses = linear_kd_loss(hidden_TH, weight_WH, targets, labels_T, shard, block_tokens=len(labels_T) // 2, **how)
    losses.loss_T.backward(ones_T)


def print_launches() -> None:
    for ranks, temperature in ((1, 1.0), (2, 2.0)):
        print(f"{ranks} ranks, temperature {temperature:g}")
        for name, call in calls(65536, 64, temperature, ranks):
            with counted() as launches:
                call()
            each = "  ".join(f"{kernel} {n}" for kernel, n in launches.triton.items())
            print(f"  {name:50} Triton {launches.triton.total():2}  PyTorch {launches.aten.total():3}  {each}")


class AbsentGPU:
    """The driver of a GPU that can be compiled for."""

    def __init__(self, capability: int, seen: Callable):
        self.capability, self.seen = capability, seen

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """A launch compiles down to machine code, hands (kernel, what was compiled) to `seen`, and does nothing."""
        before = driver._active

        def launch(kernel, grid):
            return lambda *arguments, **options: self.seen(kernel, kernel.warmup(*arguments, grid=grid, **options))

        driver.set_active(self)
        try:
            with mock.patch.object(JITFunction, "__getitem__", launch):
                yield
        finally:
            driver._active = before


def print_instructions(capability: int) -> None:
    def show(kernel, compiled):
        if compiled.hash not in shown:
            shown.add(compiled.hash)
            total, of_loops, used = count_instructions(compiled.asm["cubin"])
            print(f"  {kernel.__name__:20} {total:6}  {used:46}  loops {of_loops or 'none'}", flush=True)

    shown = set()
    with AbsentGPU(capability, show).compiling():
        for temperature in (1.0, 2.0):
            print(f"sm_{capability}, bfloat16, K = 64, temperature {temperature:g}")
            with on_meta():
                for _, call in calls(65536, 64, temperature):
                    call()


def count_instructions(cubin: bytes) -> tuple[int, list[int], str]:
    """Machine instructions of a kernel without padding; those from the target of each backward branch to the branch;
    and, in words, registers of a thread, bytes on its stack, and shared memory."""
    code = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+([^;]+);", _dump(cubin, "-sass"), re.MULTILINE)
    code = [(int(address, 16), text) for address, text in code if not text.startswith("NOP")]
    branches = [(re.search(r"BRA.* 0x([0-9a-f]+)", text), at) for at, text in code]
    spans = [(int(to[1], 16), at) for to, at in branches if to is not None and int(to[1], 16) < at]
    of_loops = [sum(first <= at <= last for at, _ in code) for first, last in spans]
    found = dict(re.findall(r"(REG|STACK|SHARED):(\d+)", _dump(cubin, "-res-usage")))
    return len(code), of_loops, f"{found['REG']} registers, {found['STACK']} B of stack, {found['SHARED']} B shared"


def _dump(cubin: bytes, what: str) -> str:
    tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        pathlib.Path(file.name).write_bytes(cubin)
        return subprocess.run([str(tool), what, file.name], capture_output=True, text=True, check=True).stdout


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["launches", "instructions"])
    parser.add_argument("--capability", type=int, default=90, help="that is compiled for (default 90)")
    options = parser.parse_args(argv)
    if options.what == "launches":
        print_launches()
    else:
        print_instructions(options.capability)


if __name__ == "__main__":
    main()
