"""A batch that breaks a run: what is kept of it, and whether the run goes on without it."""

import json
import math

import pytest
import torch

from tests.ranks import run_ranks
from tests.training import runs, small

STEP = 12


def break_step(monkeypatch, factor):
    """The student's loss is multiplied in one step (nan: it is not finite)."""
    from megakd.training import step as module

    reduce_sums, calls = module.reduce_sums, []

    def broken(*given):
        calls.append(None)
        total = reduce_sums(*given)
        if len(calls) == STEP:
            total[0, 1] *= factor
        return total

    monkeypatch.setattr(module, "reduce_sums", broken)


def train_broken(rank, ranks, config, factor):
    with pytest.MonkeyPatch.context() as monkeypatch:
        break_step(monkeypatch, factor)
        return runs.train(rank, ranks, config)


CASES = {
    "nan": (math.nan, None, "loss = nan (not finite)", {}),
    "spike": (9.0, 3.0, "is a spike", {}),
    "spike, cut sequences": (9.0, 3.0, "is a spike", {"parallel__cp": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_batch_is_kept_and_the_run_stops_or_goes_on(case, folder, tmp_path):
    factor, spike, said, layout = CASES[case]
    config = runs.values(folder, tmp_path / "stops", train__steps=14, train__spike_factor=spike, **layout)
    messages = run_ranks(2, train_broken, config, factor)
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"TrainingError: step {STEP}: ") and said in messages[0]
    kept = tmp_path / "stops" / "broken" / f"step_{STEP:08d}"
    assert str(kept) in messages[0] and "hint:" in messages[0]
    files = sorted(kept.iterdir())
    assert [f.name for f in files] == ["rank_00000.jsonl", "rank_00001.jsonl"][: 1 if layout else 2]
    lines = [json.loads(line) for f in files for line in f.read_text().splitlines()]
    assert len(lines) == 4 and all(len(line["samples"]) == 2 for line in lines)
    mean = mean_loss(lines)
    if spike:
        seen = float(messages[0].partition("loss = ")[2].split()[0])
        assert mean == pytest.approx(seen / factor, rel=1e-4), "of the same weights, token by token"
    config["run"]["dir"] = str(tmp_path / "goes_on")
    config["train"]["max_skipped_steps"] = 1
    assert run_ranks(2, train_broken, config, factor) == [None, None]
    seen = runs.lines(tmp_path / "goes_on")
    assert [line["step"] for line in seen] == [s for s in range(1, 15) if s != STEP]
    assert [line["broken"] for line in seen] == [0] * (STEP - 1) + [1, 1]
    assert seen[: STEP - 1] == runs.lines(tmp_path / "stops")


def mean_loss(lines):
    """Over the supervised tokens; nothing else has a loss."""
    losses = []
    for line in lines:
        assert line["step"] == STEP and [len(row) for row in line["ids"]] == [len(row) for row in line["losses"]]
        for labels, row in zip(line["labels"], line["losses"], strict=True):
            assert [label == -100 for label in labels] == [loss is None for loss in row]
            losses += [loss for loss in row if loss is not None]
    return sum(losses) / len(losses)


def unspoilt(rank, ranks):
    """A gradient that is not finite: (message, weights and optimizer are what they were)."""
    with small.layout() as groups:
        from megakd.errors import TrainingError

        run = small.student_step(small.config(), groups)
        run(small.batch(0, groups, 2), step=1, measure=False)
        norm = run.optimizer.get_grad_norm
        run.optimizer.get_grad_norm = lambda: math.inf
        before = {name: value.clone() for name, value in run.gpt.state_dict().items() if value is not None}
        try:
            run(small.batch(1, groups, 2), step=2, measure=False)
            message = None
        except TrainingError as error:
            message = str(error)
        same = all(torch.equal(run.gpt.state_dict()[name], value) for name, value in before.items())
        run.optimizer.get_grad_norm = norm
        return message, same, math.isfinite(run(small.batch(1, groups, 2), step=2, measure=False)["grad_norm"])


def test_a_gradient_that_is_not_finite_touches_no_weight():
    (message, same, goes_on) = run_ranks(1, unspoilt)[0]
    assert "step 2: grad_norm = inf (not finite)" in message and same and goes_on


def limits(rank, ranks):
    """Not asked for; too few losses to know; twice the median."""
    from megakd.megatron_on_cpu import install

    install("cpu")
    from megakd.training.broken import FEWEST, loss_limit

    some = [1.0] * 20 + [100.0] * 19
    return loss_limit([1.0] * 50, None), loss_limit([1.0] * (FEWEST - 1), 2.0), loss_limit(some, 2.0)


def test_what_counts_as_a_spike():
    assert run_ranks(1, limits) == [(math.inf, math.inf, 2.0)]
