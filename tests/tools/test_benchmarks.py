"""The loss benchmark: what it measures is what happened, what it calls right is right, and it runs to the end."""

import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from megakd.kernels import VocabShard
from tests.ranks import run_ranks

BENCHMARKS = pathlib.Path(__file__).parents[2] / "tools" / "benchmarks"
sys.path.append(str(BENCHMARKS))

from loss_forms import FORMS, HEADLINE  # noqa: E402
from loss_problem import Spec, build_head, build_logits, judge  # noqa: E402
from loss_report import compare  # noqa: E402
from measure import given_bytes, peak_extra_bytes  # noqa: E402

CPU = torch.device("cpu")
TOKENS, VOCAB, TOP_K, HIDDEN = 5, 2 * 509, 7, 67


@pytest.mark.slow
def test_a_run_on_two_ranks(tmp_path):
    arguments = (
        f"--tokens {TOKENS} --vocab {VOCAB} --top-k {TOP_K} --ranks 2 --hidden {HIDDEN} --repeats 2 --device cpu"
    )
    command = [sys.executable, BENCHMARKS / "loss.py", *arguments.split(), "--output", tmp_path / "loss.json"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "loss.json").read_text("utf-8"))
    rows = {row["form"]: row for row in report["rows"]}
    assert len(rows) == len(report["rows"]) and {form.name for form in FORMS} < set(rows)

    headline = rows[HEADLINE]
    assert headline["sent_teacher_bytes"] == 2 * TOP_K + 16  # the values in bfloat16, and a record of four floats
    assert headline["sent_forward_bytes"] == 32 and headline["sent_backward_bytes"] == 0
    assert rows["kd_loss bucket + CE at temperature 2, in place"]["sent_forward_bytes"] == 40
    assert 0 < headline["teacher_seconds"] < headline["seconds"] and len(headline["seconds_of_repeats"]) == 2
    whole_shard = 2 * VOCAB // 2
    assert rows["PyTorch kl_div, vocabulary gathered"]["sent_forward_bytes"] == 2 * whole_shard
    assert all(row["right"] for row in rows.values() if "not_run" not in row and row["family"] != "modelopt")
    assert "GPU" in rows["Liger fused linear JSD"]["not_run"]

    assert {ratio["against"] for ratio in report["ratios"]} >= {"Megatron vocab_parallel_cross_entropy"}
    assert report["versions"]["torch"] == importlib.metadata.version("torch") and report["hardware"]["gpu"] is None
    assert f"not run: Liger fused linear JSD: {rows['Liger fused linear JSD']['not_run']}" in done.stdout
    assert HEADLINE in done.stdout


def test_a_wrong_argument_ends_before_ranks_start():
    command = [sys.executable, BENCHMARKS / "loss.py", "--vocab", "1001", "--ranks", "2", "--top-k", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "--vocab 1001 must be a multiple of --ranks 2" in done.stderr


def test_peak_counts_what_is_alive_at_once():
    given = torch.ones(1000)

    def work():
        first = given + 1  # 4000 B
        second = first.double()  # 8000 B beside it
        del first
        third = given + 2  # 4000 B again, in the first one's place
        return second.sum() + third.sum()

    assert 12_000 <= peak_extra_bytes(work, CPU) <= 12_100
    assert peak_extra_bytes(lambda: given.add_(1), CPU) <= 100


class _SumInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad


def _counted(rank, ranks):
    x = torch.ones(3, 5, requires_grad=True)
    everyone = [torch.empty(3, 5) for _ in range(ranks)]
    _, gathered = given_bytes(lambda: dist.all_gather(everyone, x.detach()))
    y, forward = given_bytes(lambda: _SumInBackward.apply(x))
    _, backward = given_bytes(lambda: y.sum().backward())
    return gathered, forward, backward


def test_collectives_are_counted_in_forward_and_backward():
    assert run_ranks(2, _counted) == [(60, 0, 60)] * 2


def _made(form, dtype, head=False):
    shard = VocabShard(0, VOCAB, VOCAB)
    if head:
        problem = build_head(TOKENS, VOCAB, HIDDEN, shard, CPU, dtype, exact=True)
    else:
        problem = build_logits(TOKENS, VOCAB, shard, CPU, dtype, planted=TOP_K)
    targets = form.select(problem, TOP_K)
    loss_T = form.loss(problem, TOP_K, targets)
    grads = torch.autograd.grad(loss_T.sum(), problem.inputs, allow_unused=True)
    grads = [(x.main_grad if grad is None else grad).clone() for x, grad in zip(problem.inputs, grads, strict=True)]
    problem.restore()
    return problem, form.spec, TOP_K, targets, loss_T.detach(), grads


@pytest.mark.parametrize("kind", ["logits", "head"])
def test_the_judge_knows_a_wrong_gradient(kind):
    form = next(form for form in FORMS if form.kind == kind)
    problem, spec, top_k, targets, loss_T, grads = _made(form, torch.float32, kind == "head")
    verdict = judge(problem, spec, top_k, targets, loss_T, grads)
    assert verdict.right(1e-4) and verdict.gradient_factor == pytest.approx(1, abs=1e-4)

    doubled = judge(problem, spec, top_k, targets, loss_T, [2 * grad for grad in grads])
    assert not doubled.right(0.5) and doubled.gradient_factor == pytest.approx(2, abs=1e-4)
    assert not judge(problem, spec, top_k, targets, loss_T * 1.001, grads).right(1e-4)
    nan = [grad.clone() for grad in grads]
    nan[0][0, 0] = torch.nan
    assert not judge(problem, spec, top_k, targets, loss_T, nan).right(1e9)
    assert not judge(problem, Spec(ce_weight=1.0, tail="drop"), top_k, targets, loss_T, grads).right(1e-3)


def test_the_judge_sees_the_tail_beside_the_entries():
    """The columns outside the entries carry a hundredth of the gradient's norm, and still count."""
    problem, spec, top_k, targets, loss_T, [grad_TW] = _made(FORMS[0], torch.float32)
    entries = torch.zeros_like(grad_TW, dtype=torch.bool).scatter_(1, targets.ids_TK, True)
    entries[torch.arange(TOKENS), problem.labels_T] = True
    tail_off = grad_TW.where(entries, 1.02 * grad_TW)
    assert float((tail_off - grad_TW).norm() / grad_TW.norm()) < 1e-2
    assert not judge(problem, spec, top_k, targets, loss_T, [tail_off]).right(1e-2)


def test_ratios_pair_the_repeats_of_one_round():
    common = {"ranks": 2, "vocab": VOCAB, "kind": "logits", "right": True}
    ours = common | {"form": HEADLINE, "family": "megakd", "top_k": 7, "extra_shards": 0.1}
    other = common | {"form": "other", "family": "peer", "top_k": None, "extra_shards": 4.0}
    ours |= {"seconds_of_repeats": [1.0, 4.0, 1.0], "cpu_seconds_of_repeats": [1.0, 1.0, 2.0]}
    other |= {"seconds_of_repeats": [3.0, 8.0, 5.0], "cpu_seconds_of_repeats": [2.0, 3.0, 8.0]}
    rows = [ours, other]
    rows.append(rows[1] | {"ranks": 1})
    rows.append({"form": "absent", "not_run": "why"})
    [ratio] = compare(rows)
    assert (ratio["times_faster"], ratio["lowest"], ratio["highest"]) == (3.0, 2.0, 5.0)
    assert (ratio["times_less_cpu"], ratio["lowest_cpu"], ratio["highest_cpu"]) == (3.0, 2.0, 4.0)
    assert (ratio["top_k"], ratio["against"], ratio["their_extra_shards"]) == (7, "other", 4.0)
