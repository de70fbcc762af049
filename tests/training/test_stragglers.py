"""Which rank is slow: what it does by itself counts, what it waits for others does not."""

import json

import pytest
import torch

from megakd.training import stragglers
from megakd.training.stragglers import OwnSeconds, compare_ranks
from tests.ranks import run_ranks
from tests.training import runs


def test_the_time_ends_with_the_last_reduction_of_gradients(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(stragglers, "now", lambda: now[0])

    def reduce(seconds):
        now[0] += seconds
        return "reduced"

    own = OwnSeconds()
    reduce_later = own.before(reduce)
    for begin in (5.0, 70.0):
        now[0] = begin
        own.start()
        for work in (1.0, 2.0):
            now[0] += work
            assert reduce_later(100.0) == "reduced"
        assert own.read() == 103.0, "what lies before the last one"


def compared(rank, ranks, seconds):
    return compare_ranks(seconds[rank], torch.device("cpu"))


def test_the_slowest_is_named_beside_the_median():
    assert (
        run_ranks(3, compared, [0.2, 0.7, 0.1]) == [{"slowest_rank": 1, "slowest_over_median": pytest.approx(3.5)}] * 3
    )
    assert run_ranks(1, compared, [0.2]) == [{}]


def train_slowly(rank, ranks, config):
    """Rank 1 takes half a second longer to read a batch."""
    import time

    from megakd.assembly import setup

    load_batch = setup.load_batch

    def late(*arguments):
        time.sleep(0.5 * rank)
        return load_batch(*arguments)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(setup, "load_batch", late)
        return runs.train(rank, ranks, config)


def test_a_rank_that_reads_slowly_is_in_the_metrics(folder, tmp_path):
    config = runs.values(folder, tmp_path, train__steps=3, train__micro_batch_size=4)
    assert run_ranks(2, train_slowly, config) == [None, None]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    seen = [(line["slowest_rank"], line["slowest_over_median"]) for line in lines if line["kind"] == "train"]
    assert len(seen) == 3 and [rank for rank, _ in seen[1:]] == [1, 1] and min(ratio for _, ratio in seen[1:]) > 1.2
