"""The passes of select_top_k against `megakd.kernels.selection_rows` and float64."""

import pytest
import torch
from torch.testing import assert_close

from megakd.kernels import VocabShard, select_top_k, selection_rows, selection_steps
from megakd.kernels.selection import select_and_predict
from megakd.kernels.triton import candidates
from megakd.kernels.triton import selection_rows as triton_selection
from megakd.kernels.triton import selection_steps as triton_steps
from tests.kernels.dense import dense_targets
from tests.kernels.triton_cases.problems import DEVICE, REMARKS, case_name, teacher

pytestmark = REMARKS
SELECTIONS = [
    (101, 8, 1.0, torch.bfloat16),  # too narrow for chunks: exact
    (5, 5, 2.0, torch.float32),  # the whole vocabulary
    (144, 8, 2.0, torch.bfloat16),
    (4099, 1, 2.0, torch.float32),
    (4099, 8, 1.0, torch.bfloat16),
    (4109, 8, 2.0, torch.float32),  # with padding, rows start at 16 bytes
    (4109, 100, 1.0, torch.float16),
]


@pytest.mark.parametrize("width, top_k, temperature, dtype", SELECTIONS, ids=case_name)
def test_select_and_predict(width, top_k, temperature, dtype, monkeypatch):
    monkeypatch.setattr(candidates, "SCRATCH_BYTES", 8 * 3 * 256)  # several blocks of rows
    x, shard = teacher(width, top_k, dtype), VocabShard(0, width + 3, width)
    labels = torch.tensor([0, width - 1, -100, width // 2, 3, 1], device=DEVICE)
    got, said = select_and_predict(x, labels, top_k, shard, temperature)
    ids, log_p, tail = dense_targets(x[:, :width], top_k, temperature)
    assert torch.equal(got.ids_TK, ids)
    assert_close(got.logprobs_TK.double(), log_p, atol=2e-6, rtol=1e-6)
    assert_close(got.log_tail_T.double(), tail, atol=2e-6, rtol=1e-6)
    log_p = x[:, :width].double().log_softmax(1)
    top, first = log_p.max(1)
    assert torch.equal(said.id_T, first)
    assert_close(said.logprob_T.double(), top, atol=2e-6, rtol=1e-6)
    label_log_p = log_p.gather(1, labels.clamp(min=0)[:, None])[:, 0].where(labels >= 0, 0)
    assert_close(said.label_logprob_T.double(), label_log_p, atol=2e-6, rtol=1e-6)
    if top_k > 1 and width > 4099:
        return  # one way with chunks, one without, is enough for what is alone
    alone = select_top_k(x, top_k, shard, temperature)
    assert torch.equal(alone.ids_TK, ids) and torch.equal(alone.logprobs_TK, got.logprobs_TK)


def test_candidates():
    """A row of many ties is crowded and looked at anew; zeros are equal whatever their sign."""
    x, width = teacher(4099, 8, torch.bfloat16), 4099
    x[0, :width] /= 8
    x[0, :8], x[0, 8:18], below = 17.0, 15.0, range(128, 2048, 128)
    x[0, below] = 15.125  # of the first lane, which is looked up: beyond the largest of the lanes that are not
    x[3, [5, 1000, 4000]] = -6.0  # above those that are equal
    x[5, :width] = -0.0
    x[5, 7:width:2] = 0.0
    x[4, 4098] = torch.nan
    found = candidates.find_candidates(x, 8, width, 2.0, at_one=True)
    assert found.x_TM.dtype == x.dtype and found.x_TM.shape == (6, 32)
    assert found.x_TM[4].isnan().all()
    for row in (0, 1, 2, 3, 5):
        columns, order = found.columns_TM[row], x[row, :width].double().sort(descending=True, stable=True)
        used = columns >= 0
        assert torch.equal(x[row, columns[used].long()], found.x_TM[row][used])
        assert (found.columns_TM[row][~used] == -1).all() and found.x_TM[row][~used].isneginf().all()
        assert set(order.indices[:8].tolist()) <= set(columns.tolist())
        left = torch.ones(width, dtype=torch.bool, device=DEVICE).index_fill_(0, columns[used].long(), False)
        rest = x[row, :width].double()[left]
        assert found.rest_4T[0, row] == rest.max()
        for lane, temperature in ((1, 2.0), (2, 1.0)):
            want = ((rest - rest.max()) / temperature).exp().sum()
            assert_close(found.rest_4T[lane, row].double(), want, rtol=1e-6, atol=0)
    assert not set(below) & set(found.columns_TM[0].tolist())
    assert sorted(found.columns_TM[3].tolist())[-9:] == [-1, 0, 1, 2, 3, 4, 5, 1000, 4000]
    assert sorted(found.columns_TM[5].tolist())[-9:] == [-1, *range(8)]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_teacher_row_is_named(bad):
    x = teacher(1009, 8, torch.bfloat16)
    x[4, 1008] = bad
    with pytest.raises(ValueError, match="in 1 of 6 rows, first in row 4"):
        select_top_k(x, 8, VocabShard(0, 1012, 1009))


class Half(VocabShard):
    """One of two shards, in this process alone."""

    ranks = 2

    def __post_init__(self):
        pass


@pytest.mark.parametrize("half, temperature", [(4099, 1.0), (67, 2.0)])
def test_two_shards_share_the_ties(half, temperature):
    """The passes and steps on the halves of a vocabulary: what PyTorch makes of each, and of both."""
    size, top_k = 2 * half - 2, 8  # the second half is padded
    x, labels = teacher(size, 8, torch.bfloat16), torch.tensor([0, half, -100, size - 1, 5, half - 1], device=DEVICE)
    halves = x[:, :half], x[:, half : 2 * half]
    shards, ways = (Half(0, half, size), Half(half, 2 * half, size)), {}
    for way, passes, steps in (("triton", triton_selection, triton_steps), ("torch", selection_rows, selection_steps)):
        at_one = temperature != 1
        scans = [passes.scan_rows(halves[i], top_k, shards[i], temperature, at_one=at_one) for i in (0, 1)]
        values = torch.stack([scan.values_TL for scan in scans])
        assert values.dtype == x.dtype and values.shape == (2, 6, top_k)
        chosen, agreed = [], [steps.share(values, top_k, rank) for rank in (0, 1)]
        for i, (threshold_T, ties_T, fine_T) in enumerate(agreed):
            assert fine_T.all()
            given = threshold_T, ties_T, top_k, shards[i], temperature, labels
            chosen.append(passes.take_entries(halves[i], scans[i], *given))
        records = torch.stack([one.record_TL for one in chosen])
        normal = [steps.normalize(one.entry_logits_TK, records, labels, temperature) for one in chosen]
        ways[way] = agreed, chosen, normal
    for got, want in zip(ways["triton"][0], ways["torch"][0], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    for got, want in zip(ways["triton"][1], ways["torch"][1], strict=True):
        assert torch.equal(got.ids_TK, want.ids_TK) and torch.equal(got.entry_logits_TK, want.entry_logits_TK)
        exact = [0, 2, -2, -1]
        assert torch.equal(got.record_TL[:, exact], want.record_TL[:, exact])
        assert_close(got.record_TL, want.record_TL, rtol=1e-6, atol=0)
    for got, want in zip(ways["triton"][2], ways["torch"][2], strict=True):
        assert torch.equal(got.said.id_T, want.said.id_T) and got.said.id_T.dtype == torch.int64
        parts = ((n.logprobs_TK, n.log_tail_T, n.said.logprob_T, n.said.label_logprob_T) for n in (got, want))
        for a, b in zip(*parts, strict=True):
            assert_close(a, b, rtol=1e-6, atol=2e-6)
    ids = torch.cat([one.ids_TK.where(one.ids_TK >= 0, size) for one in ways["triton"][1]], 1).sort(1).values
    assert torch.equal(ids[:, :top_k], dense_targets(x[:, :size], top_k)[0])
