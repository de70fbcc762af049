"""What the host does on CUDA: few launches, and no question to the device, so that a CUDA graph can be captured."""

import functools
import sys

import pytest
import torch
from torch.testing import assert_close

from megakd.kernels import VocabShard, checks, kd_loss, select_top_k, terms
from tests.kernels.test_triton import ROOT
from tests.kernels.triton_cases.problems import DEVICE, INTERPRETED, REMARKS, teacher

sys.path.append(str(ROOT / "tools" / "gpu"))

import static_counts

pytestmark = REMARKS
MOST = {  # launches: of Triton's kernels, and of PyTorch's
    "select_top_k": (7, 2),
    "select_and_predict": (7, 15),
    "sample_targets": (2, 116),
    "sample_and_predict": (2, 160),
    "predict": (2, 37),
    "linear_kd_loss": (13, 67),
    "kd_loss": (8, 3),
    "dense_kd_loss": (5, 10),
}


@pytest.mark.parametrize("ranks, temperature, width", [(1, 1.0, 65536), (2, 2.0, 65536), (2, 2.0, 50)])
def test_launches_are_few_and_nothing_waits_for_the_device(ranks, temperature, width):
    for name, call in static_counts.calls(width, 8, temperature, ranks):
        with static_counts.counted() as launches:
            call()
        of_triton, of_torch = MOST[name.replace(",", " ").split()[0]]
        assert 0 < launches.triton.total() <= of_triton and launches.aten.total() <= of_torch, (name, launches.aten)


def test_a_question_to_the_device_is_noticed():
    x = torch.ones(3, device="meta")
    for wait in (lambda: bool(x.any()), lambda: x[x > 0], lambda: x.nonzero(), lambda: torch.ones(3).to("meta")):
        with static_counts.counted(), pytest.raises((static_counts.HostWaitError, RuntimeError)):
            wait()


class OnADevice(torch.Tensor):
    """A tensor that is a device's, as it says."""

    device = torch.device("cuda")


def test_a_device_stops_with_the_message_and_a_cpu_names_the_row(monkeypatch):
    labels = torch.tensor([0, 101, -100, 5, 77, 100])
    fine = terms.find_stray(labels, labels >= 0, VocabShard(0, 104, 101)).logical_not()
    with pytest.raises(ValueError, match="row 1"):
        checks.expect(fine, "a label", functools.partial(refuse, "row 1"))
    checks.expect(fine[2:], "a label", functools.partial(refuse, "row 1"))
    said = []
    monkeypatch.setattr(torch, "_assert_async", lambda fine, message: said.append((bool(fine), message)))
    for rows in (fine, fine[2:], fine[:0]):
        checks.expect(rows.as_subclass(OnADevice), terms.ROWS_MESSAGE, functools.partial(refuse, "row 1"))
    assert [holds for holds, _ in said] == [False, True, True]
    message = said[0][1]
    assert terms.ROWS_MESSAGE in message and "CUDA_LAUNCH_BLOCKING=1 names the row" in message
    assert len(message) < 256
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    with pytest.raises(ValueError, match="row 1"):
        checks.expect(fine.as_subclass(OnADevice), "a label", functools.partial(refuse, "row 1"))
    assert len(said) == 3


def refuse(row):
    raise ValueError(row)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_a_cuda_graph_holds_selection_loss_and_backward(monkeypatch):
    monkeypatch.delenv("CUDA_LAUNCH_BLOCKING", raising=False)
    torch.use_deterministic_algorithms(False)
    shard, labels = VocabShard(0, 4112, 4109), torch.tensor([0, 4108, -100, 5, 77, 500], device=DEVICE)
    student, taught = (teacher(4109, seed, torch.bfloat16) for seed in (8, 9))
    leaf = student.clone().requires_grad_()

    def step():
        leaf.grad = None
        loss = kd_loss(leaf, select_top_k(taught, 8, shard), labels, shard, divergence="jsd", ce_weight=0.3)
        loss.loss_T.backward(torch.ones_like(loss.loss_T))
        return loss.loss_T.detach(), leaf.grad

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        want = [part.clone() for part in step()]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            got = step()
    graph.replay()
    torch.cuda.synchronize()
    assert_close([*got], want, rtol=0, atol=0)
