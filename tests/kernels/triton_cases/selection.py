"""The passes of select_top_k against `megakd.kernels.selection_rows` and float64."""

import pytest
import torch
from torch.testing import assert_close

from megakd.kernels import VocabShard, select_top_k, selection, selection_rows
from megakd.kernels.triton import selection_rows as triton_selection
from tests.kernels.dense import dense_targets
from tests.kernels.triton_cases.problems import REMARKS, case_name, teacher

pytestmark = REMARKS
SELECTIONS = [
    (101, 8, 1.0, torch.bfloat16),  # too narrow for chunks
    (144, 8, 1.0, torch.bfloat16),
    (4099, 1, 2.0, torch.float32),
    (4099, 8, 1.0, torch.bfloat16),
    (4109, 8, 2.0, torch.float32),  # with padding, rows start at 16 bytes
    (4109, 100, 1.0, torch.bfloat16),
]


@pytest.mark.parametrize("width, top_k, temperature, dtype", SELECTIONS, ids=case_name)
def test_select_top_k(width, top_k, temperature, dtype, monkeypatch):
    monkeypatch.setattr(triton_selection, "SCRATCH_BYTES", 8 * 3 * 256)  # several blocks of rows
    x, shard = teacher(width, top_k, dtype), VocabShard(0, width + 3, width)
    chunked = isinstance(triton_selection.scan_rows(x, top_k, shard, 1.0), triton_selection.Scan)
    assert chunked == (width > 101)
    got = select_top_k(x, top_k, shard, temperature)
    ids, log_p, tail = dense_targets(x[:, :width], top_k, temperature)
    assert torch.equal(got.ids_TK, ids)
    assert_close(got.logprobs_TK.double(), log_p, atol=2e-6, rtol=1e-6)
    assert_close(got.log_tail_T.double(), tail, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_teacher_row_is_named(bad):
    x = teacher(1009, 8, torch.bfloat16)
    x[4, 1008] = bad
    with pytest.raises(ValueError, match="in 1 of 6 rows, first in row 4"):
        select_top_k(x, 8, VocabShard(0, 1012, 1009))


def test_two_shards_share_the_ties():
    """The passes on the halves of a vocabulary, with the threshold of both: what PyTorch takes from each."""
    x, half, top_k = teacher(8198, 8, torch.bfloat16), 4099, 8
    halves, shard = (x[:, :half], x[:, half : 2 * half]), VocabShard(0, half, half)
    scans = [triton_selection.scan_rows(part, top_k, shard, 1.0) for part in halves]
    values = torch.stack([scan.values_TL for scan in scans])
    assert values.dtype == x.dtype and values.shape == (2, 6, top_k)
    ids = []
    for rank, (part, scan) in enumerate(zip(halves, scans, strict=True)):
        agreed = selection.share(values, top_k, rank)
        got = triton_selection.take_entries(part, scan, *agreed, top_k, 1.0)
        want = selection_rows.take_entries(part, selection_rows.scan_rows(part, top_k, shard, 1.0), *agreed, top_k, 1.0)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1][:, ::2], want[1][:, ::2])
        assert_close(got[1], want[1], rtol=1e-6, atol=0)
        ids.append(torch.where(got[0] >= 0, got[0] + rank * half, 8198))
    assert torch.equal(torch.cat(ids, 1).sort(1).values[:, :top_k], dense_targets(x[:, :8198], top_k)[0])
