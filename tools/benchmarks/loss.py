"""Seconds, bytes and correctness of the distillation loss, beside its peers: one table, and one JSON file.

    make bench                                           # or: python tools/benchmarks/loss.py
    make bench ARGS="--vocab 131072 --top-k 64 --ranks 2 --repeats 9 --output results.json"

For every vocabulary, K and number of ranks, each form is first compared with float64 on a few rows of the full width,
then measured: bytes handed to collectives, peak bytes of tensors, and seconds of the teacher's part (selection), the
forward and the backward. Repeats go round the forms, so that a busy machine is busy for all of them. A peer that is
wrong is measured and marked; one of ours that is wrong ends the run. Peers that are not installed are listed as such:
`pip install nvidia-modelopt requests liger-kernel` (or a folder of them in PYTHONPATH) brings them in.
"""

import argparse
import logging
import os
import re
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from loss_forms import FORMS, Form
from loss_problem import Problem, build_head, build_logits, judge
from loss_report import build_report, print_report, save_report
from measure import copy_bandwidth, given_bytes, peak_extra_bytes, phase_seconds, slowest

from megakd.kernels import VocabShard

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOLERANCES = {"bf16": 1e-2, "fp16": 2e-3, "fp32": 1e-4}
CHECKED_TOKENS = 16


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512, help="T, tokens in a call (default 512)")
    parser.add_argument("--vocab", type=int, nargs="+", default=[32768, 131072], help="V (default 32768 131072)")
    parser.add_argument("--top-k", type=int, nargs="+", default=[64, 256], help="K (default 64 256)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="tensor parallel sizes (default 1 2)")
    parser.add_argument("--hidden", type=int, default=256, help="H of the problems with an output layer (default 256)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each form (default 5)")
    parser.add_argument("--forms", default=".", help="regular expression: only forms whose name it finds")
    parser.add_argument("--no-peers", action="store_true", help="megakd's forms only; loads no Megatron-Core")
    parser.add_argument("--output", type=Path, help="the JSON file (default: none is written)")
    options = parser.parse_args(argv)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    for vocab in options.vocab:
        for ranks in options.ranks:
            if vocab % ranks or max(options.top_k) > vocab:
                parser.error(f"--vocab {vocab} must be a multiple of --ranks {ranks} and at least --top-k")
    if options.device == "cuda" and max(options.ranks) > torch.cuda.device_count():
        parser.error(f"--ranks {max(options.ranks)} needs as many GPUs; this machine has {torch.cuda.device_count()}")
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces itself on every use
    load_before, rows, floors = os.getloadavg(), [], []
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory(prefix="megakd-bench-") as folder:
            mp.spawn(run_rank, (ranks, folder, options), nprocs=ranks)
            answer = torch.load(f"{folder}/answer")
        rows += answer["rows"]
        floors.append(answer["floor"])
    report = build_report(options, rows, floors, load_before)
    print_report(report)
    if options.output:
        save_report(report, options.output)
        print(f"\nwritten to {options.output}")


def run_rank(rank: int, ranks: int, folder: str, options: argparse.Namespace) -> None:
    """One rank's part of all measurements at one tensor parallel size; rank 0 leaves the answer in the folder."""
    warnings.simplefilter("ignore", FutureWarning)  # deprecations inside the peers
    logging.getLogger("modelopt").setLevel(logging.ERROR)
    device = torch.device(options.device, rank if options.device == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    forms = [form for form in FORMS + load_peers(device, ranks, options) if re.search(options.forms, form.name)]
    bandwidth = copy_bandwidth(device, 1 << 28 if device.type == "cpu" else 1 << 31)
    rows = []
    for vocab in options.vocab:
        for kind in ("logits", "head"):
            some = [form for form in forms if form.kind == kind]
            rows += measure_kind(some, kind, vocab, device, options) if some else []
    if rank == 0:
        floor = {"ranks": ranks, "threads": torch.get_num_threads(), "copy_bytes_per_second": bandwidth}
        torch.save({"rows": rows, "floor": floor}, f"{folder}/answer")
    dist.barrier()
    dist.destroy_process_group()


def load_peers(device: torch.device, ranks: int, options: argparse.Namespace) -> list[Form]:
    if options.no_peers:
        return []
    from megakd import megatron_on_cpu

    megatron_on_cpu.install(device.type)
    from loss_peers import build_peers
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    return build_peers(device)


def measure_kind(
    forms: list[Form], kind: str, vocab: int, device: torch.device, options: argparse.Namespace
) -> list[dict]:
    """Rows of all forms that take this kind of problem, at one vocabulary and all K."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    width = vocab // ranks
    shard = VocabShard(rank * width, (rank + 1) * width, vocab, dist.group.WORLD if ranks > 1 else None)
    dtype = DTYPES[options.dtype]
    contestants = [(form, k) for form in forms for k in options.top_k if takes_k(form) or k == options.top_k[0]]
    rows = []
    for form, top_k in contestants:
        row = {"form": form.name, "family": form.family, "kind": kind, "ranks": ranks, "vocab": vocab}
        rows.append(row | {"top_k": top_k if takes_k(form) else None, "tokens": options.tokens})
        checked = build(kind, CHECKED_TOKENS, vocab, shard, device, dtype, options, planted=top_k)
        rows[-1] |= check(form, checked, top_k, options)
        del checked
    problem = build(kind, options.tokens, vocab, shard, device, dtype, options)
    shard_bytes = options.tokens * width * dtype.itemsize
    for row in rows:  # an output layer's gradient that is returned, not added to main_grad, is nobody's extra
        returned = kind == "head" and not row.get("into_main_grad")
        row["weight_gradient_bytes"] = width * options.hidden * dtype.itemsize if returned else 0
    running = [(row, *each) for row, each in zip(rows, contestants, strict=True) if "not_run" not in row]
    for row, form, top_k in running:
        problem.restore()
        peak = peak_extra_bytes(lambda f=form, k=top_k: run(f, problem, k), device) - row["weight_gradient_bytes"]
        extra = torch.tensor(peak, device=device)
        dist.all_reduce(extra, op=dist.ReduceOp.MAX)
        row |= {"extra_bytes": int(extra), "extra_shards": int(extra) / shard_bytes, "phases": []}
    for _ in range(options.repeats):
        for row, form, top_k in running:
            problem.restore()
            row["phases"].append(phase_seconds(phases(form, problem, top_k), device))
    for row, form, _ in running:
        summarize(row, *slowest(row.pop("phases")), form)
    return rows


def takes_k(form: Form) -> bool:
    return form.spec.teacher in ("top_k", "sampled")


def build(kind, tokens, vocab, shard, device, dtype, options, planted=None) -> Problem:
    if kind == "logits":
        return build_logits(tokens, vocab, shard, device, dtype, planted)
    return build_head(tokens, vocab, options.hidden, shard, device, dtype, exact=planted is not None)


def phases(form: Form, problem: Problem, top_k: int) -> list:
    """Teacher's part, forward, backward: each takes what the one before returned."""

    def forward(targets):
        loss_T = form.loss(problem, top_k, targets)
        return targets, loss_T

    def backward(made):
        targets, loss_T = made
        grads = torch.autograd.grad(loss_T.sum(), problem.inputs, allow_unused=True)
        return targets, loss_T.detach(), grads

    return [lambda _: form.select(problem, top_k) if form.select else None, forward, backward]


def run(form: Form, problem: Problem, top_k: int):
    result = None
    for phase in phases(form, problem, top_k):
        result = phase(result)
    return result


def check(form: Form, problem: Problem, top_k: int, options: argparse.Namespace) -> dict:
    """Errors against float64 and bytes handed to collectives, per token; or why it does not run."""
    result, sent = None, []
    try:
        for phase in phases(form, problem, top_k):
            result, given = given_bytes(lambda p=phase, r=result: p(r))
            sent.append(given / problem.tokens)
    except Exception as error:
        if form.family == "megakd":
            raise
        if not isinstance(error, ImportError | RuntimeError):
            traceback.print_exc()
        return {"not_run": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    targets, loss_T, grads = result
    into_main_grad = grads[-1] is None
    grads = [(x.main_grad if grad is None else grad).clone() for x, grad in zip(problem.inputs, grads, strict=True)]
    problem.restore()
    verdict = judge(problem, form.spec, top_k, targets, loss_T, grads, form.gives)
    right = verdict.right(TOLERANCES[options.dtype])
    if form.family == "megakd" and not right:
        raise AssertionError(f"{form.name} at V={problem.shard.size}, K={top_k} is wrong: {verdict}")
    names = "sent_teacher_bytes", "sent_forward_bytes", "sent_backward_bytes"
    return vars(verdict) | {"right": right, "into_main_grad": into_main_grad} | dict(zip(names, sent, strict=True))


def summarize(row: dict, repeats: list[list[float]], cpu_seconds: list[float], form: Form) -> None:
    """Medians; the teacher's part is None where it cannot be told apart."""
    teacher, forward, backward = (torch.tensor(phase).median().item() for phase in zip(*repeats, strict=True))
    row |= {
        "seconds": torch.tensor([sum(phase) for phase in repeats]).median().item(),
        "teacher_seconds": teacher if form.select else None,
        "forward_seconds": forward,
        "backward_seconds": backward,
        "seconds_of_repeats": [sum(phase) for phase in repeats],
        "cpu_seconds": torch.tensor(cpu_seconds).median().item(),
        "cpu_seconds_of_repeats": cpu_seconds,
    }


if __name__ == "__main__":
    sys.exit(main())
