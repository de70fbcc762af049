"""The row passes one by one: blocks, gaps between supervised rows, crowded ties, and the choice of implementation."""

import logging

import pytest
import torch
from torch.testing import assert_close

from megakd.kernels import VocabShard, kd_loss, paths, rows, select_top_k, selection_rows
from tests.kernels.dense import dense_targets, draw

T, V, K = 11, 101, 8


@pytest.fixture(params=[1, 6 * 4 * (V + 1), 1 << 20])  # one row, three or six, all rows at a time
def block_bytes(request, monkeypatch):
    monkeypatch.setattr(rows, "BLOCK_BYTES", request.param)


def test_blocks_and_gaps_change_nothing(block_bytes, monkeypatch):
    student, teacher, labels = draw(T, V, dtype=torch.bfloat16)
    labels[[0, 2, 5, 9]] = -100
    shard = VocabShard(0, V, V)
    targets = select_top_k(teacher, K, shard, 2.0)

    def run():
        leaf = student.clone().requires_grad_()
        outputs = kd_loss(leaf, targets, labels, shard, ce_weight=0.3)
        outputs.loss_T.sum().backward()
        return *(part.detach() for part in outputs), leaf.grad

    got = run()
    monkeypatch.setattr(rows, "BLOCK_BYTES", 1 << 30)
    assert all(torch.equal(a, b) for a, b in zip(got, run(), strict=True))


@pytest.mark.parametrize("width, chunks", [(101, 101), (101, 7), (101, 1), (128, 16), (97, 50)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_summarize(block_bytes, width, chunks, temperature):
    _, teacher, _ = draw(T, V + 30, dtype=torch.bfloat16)
    teacher[2, 5], teacher[3, 96], teacher[4, width - 1] = torch.nan, torch.inf, -torch.inf
    teacher[5, :50] = 3e38  # finite, but their sum is not
    teacher[:, width:] = torch.nan
    teacher[6:8] = teacher[6:8].round().clamp(max=2)  # maxima that are not alone
    got = rows.summarize(teacher, width, chunks, temperature, at_one=temperature != 1, drift=True, column=True)
    assert (got.sum_at_one_TC is None) == (temperature == 1)
    fine = torch.tensor([row not in (2, 3, 4) for row in range(T)])
    assert got.max_TC[~fine].isnan().all()
    for c in range(chunks):
        x = teacher[fine, c:width:chunks].double()
        assert torch.equal(got.max_TC[fine, c].double(), x.amax(1))
        gap = x - x.amax(1, keepdim=True)
        first = (gap == 0).int().argmax(1)  # the lowest of equals
        assert torch.equal(got.column_TC[fine, c], (c + chunks * first).int())
        e = (gap / temperature).exp()
        assert_close(got.sum_TC[fine, c].double(), e.sum(1), rtol=1e-6, atol=0)
        assert_close(got.drift_TC[fine, c].double(), (e * gap / temperature).sum(1), rtol=1e-6, atol=1e-7)
        if temperature != 1:
            assert_close(got.sum_at_one_TC[fine, c].double(), gap.exp().sum(1), rtol=1e-6, atol=0)
    alone = rows.summarize(teacher, width, chunks, temperature)
    assert alone.drift_TC is alone.sum_at_one_TC is alone.column_TC is None
    assert torch.equal(alone.max_TC[fine], got.max_TC[fine]) and torch.equal(alone.sum_TC[fine], got.sum_TC[fine])


def test_crowded_rows_are_scanned_whole(monkeypatch):
    """More ties at the threshold than chunks looked at, in some rows; and few candidates in the others."""
    width, top_k = 4099, 5
    _, teacher, _ = draw(T, width)
    teacher[[1, 7]] = teacher[[1, 7]].round().clamp(max=3)
    teacher[8] = 0.0
    taken = []
    monkeypatch.setattr(
        selection_rows, "_take", lambda *a, take=selection_rows._take: (taken.append(a[0].shape), take(*a))
    )
    targets = select_top_k(teacher, top_k, VocabShard(0, width, width))
    ids, log_p, tail = dense_targets(teacher, top_k)
    assert torch.equal(targets.ids_TK, ids)
    assert_close(targets.logprobs_TK.double(), log_p, atol=2e-6, rtol=1e-6)
    assert_close(targets.log_tail_T.double(), tail, atol=2e-6, rtol=1e-6)
    assert taken[-1] == (3, width) and all(columns < width / 3 for _, columns in taken[:-1])


def test_the_choice_of_path_is_logged_once_with_its_reason(monkeypatch, caplog):
    paths._load.cache_clear()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with caplog.at_level(logging.INFO):
        assert paths.row_passes(torch.zeros(1, 1)) is paths.row_passes(torch.zeros(2, 2)) is rows
    assert [r.getMessage() for r in caplog.records] == [
        "loss kernels: megakd.kernels.rows, because the logits are on cpu"
    ]
