"""What a recording keeps of logits: labels, mass limits, temperatures; the same however the vocabulary is split."""

import functools

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megakd.kernels import VocabShard
from tests.ranks import run_ranks

T, V, PADDED = 13, 101, 104


def logits(dtype=torch.float32):
    values = 3 * torch.randn(T, PADDED, generator=torch.Generator().manual_seed(2))
    values[0, :V] = 1.0  # all equal: ids decide
    values[1, 7] = 90.0  # one takes all
    values[:, V:] = 1e9  # padding, never to be seen
    return values.to(dtype)


def labels():
    return torch.randint(V, (T,), generator=torch.Generator().manual_seed(5))


def shard_of(rank, ranks):
    width = PADDED // ranks
    return VocabShard(rank * width, (rank + 1) * width, V, dist.group.WORLD if ranks > 1 else None)


def choose(rank, ranks, **recipe):
    from megakd.teachers.entries import Recipe, choose_entries

    shard = shard_of(rank, ranks)
    recipe = Recipe(**({"mode": "top_k", "top_k": 8, "temperatures": (1.0, 3.0)} | recipe))
    return choose_entries(logits()[:, shard.start : shard.stop].contiguous(), labels(), shard, recipe)


def dense(temperature):
    return (logits()[:, :V].double() / temperature).log_softmax(1)


RECIPES = [
    {},
    {"keep_label": True},
    {"mode": "top_p", "top_p": 0.8},
    {"mode": "top_p", "top_p": 0.8, "keep_label": True},
    {"mode": "top_p", "top_p": 1.0, "top_k": V},
    {"temperatures": (3.0, 0.5), "keep_label": True},
]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_entries_and_tail_are_the_teacher_at_every_temperature(ranks, recipe):
    answers = run_ranks(ranks, choose_with, recipe)
    entries = answers[0]
    for other in answers[1:]:
        assert all(a is b or torch.equal(a, b) for a, b in zip(other, entries, strict=True)), "ranks differ"
    used_TK = entries.ids_TK >= 0
    for x, temperature in enumerate(recipe.get("temperatures", (1.0, 3.0))):
        log_p_TV = dense(temperature)
        if x == 0:
            want_TK = log_p_TV.gather(1, entries.ids_TK.clamp(min=0))
            torch.testing.assert_close(entries.logprobs_TK[used_TK].double(), want_TK[used_TK], atol=1e-5, rtol=0)
        for t in range(T):
            log_p_TV[t, entries.ids_TK[t][used_TK[t]]] = -torch.inf
        torch.testing.assert_close(entries.log_tail_XT[x].double(), log_p_TV.logsumexp(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        entries.label_logprob_T.double(), dense(1.0).gather(1, labels()[:, None])[:, 0], atol=1e-5, rtol=0
    )
    assert entries.top_id_T.tolist() == logits()[:, :V].argmax(1).tolist()
    ids = [row[row >= 0].tolist() for row in entries.ids_TK]
    assert all(row == sorted(set(row)) for row in ids)
    assert (entries.logprobs_TK[~used_TK] == -torch.inf).all()


def choose_with(rank, ranks, recipe):
    return choose(rank, ranks, **recipe)


def ordered():
    """Ids from the most likely down, the lower one among equals."""
    return np.argsort(-logits()[:, :V].numpy(), axis=1, kind="stable")


def test_the_label_takes_the_place_of_the_least_likely():
    kept = choose(0, 1, keep_label=True).ids_TK.tolist()
    for t, label in enumerate(labels().tolist()):
        best = ordered()[t, :8].tolist()
        want = best if label in best else [*best[:7], label]
        assert kept[t] == sorted(want)


@pytest.mark.parametrize("keep_label", [False, True])
def test_top_p_keeps_the_fewest_entries_that_reach_it(keep_label):
    entries = choose(0, 1, mode="top_p", top_p=0.8, top_k=20, keep_label=keep_label)
    p_TV = dense(1.0).exp().numpy()
    for t, label in enumerate(labels().tolist()):
        best = ordered()[t, :20]
        if keep_label and label not in best:
            best[-1] = label
        count = int((np.cumsum(p_TV[t, best]) - p_TV[t, best] < 0.8).sum())
        want = {*best[:count].tolist()} | ({label} if keep_label else set())
        assert {i for i in entries.ids_TK[t].tolist() if i >= 0} == want
    assert (entries.ids_TK[1] >= 0).sum() == 1 + int(keep_label and labels()[1].item() != 7)
    assert (entries.ids_TK[0] >= 0).sum() == 20, "top_k is the limit where no few entries reach it"


def draw(rank, ranks, recipe, seed=4, repeats=1):
    from megakd.teachers.entries import Recipe, draw_entries

    shard = shard_of(rank, ranks)
    mine = logits()[:, shard.start : shard.stop].repeat(repeats, 1)
    recipe = Recipe(**({"temperatures": (2.0,)} | recipe))
    half = len(mine) // 2
    groups = [(torch.arange(half), seed), (torch.arange(half, len(mine)), seed + 1)]
    return draw_entries(mine, labels().repeat(repeats), shard, recipe, groups)


DRAWN = [{"mode": "sampled", "top_k": 1, "draws": 9}, {"mode": "hybrid", "top_k": 6, "draws": 9}]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("recipe", [*DRAWN, {"mode": "hybrid", "top_k": V, "draws": 2}], ids=str)
def test_drawn_entries_are_a_distribution_with_the_exact_entropy(ranks, recipe):
    answers = run_ranks(ranks, draw, recipe)
    for other in answers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, answers[0], strict=True)), "ranks differ"
    entries, log_p_TV = answers[0], dense(2.0)
    torch.testing.assert_close(entries.logprobs_TK.double().exp().sum(1), torch.ones(T).double(), atol=1e-5, rtol=0)
    entropy_T = -(log_p_TV.exp() * log_p_TV).sum(1)
    torch.testing.assert_close(entries.entropy_T.double(), entropy_T, atol=1e-4, rtol=1e-4)
    label_T = dense(1.0).gather(1, labels()[:, None])[:, 0]
    torch.testing.assert_close(entries.label_logprob_T.double(), label_T, atol=1e-5, rtol=0)
    assert entries.top_id_T.tolist() == logits()[:, :V].argmax(1).tolist()
    for ids, counted in zip(entries.ids_TK.tolist(), (entries.ids_TK >= 0).sum(1).tolist(), strict=True):
        assert ids[:counted] == sorted(set(ids[:counted])) and set(ids[counted:]) <= {-1}
    if recipe["mode"] == "hybrid":
        head = np.sort(ordered()[:, : recipe["top_k"]], axis=1)
        for t in range(T):
            place = [entries.ids_TK[t].tolist().index(i) for i in head[t]]
            want = log_p_TV[t, torch.from_numpy(head[t].copy())]
            torch.testing.assert_close(entries.logprobs_TK[t, place].double(), want, atol=1e-5, rtol=0)


def test_draws_and_what_the_teacher_would_say_are_of_one_read(monkeypatch):
    from megakd.kernels import rows

    reads = []
    for read in (rows.summarize, rows.extremes):
        counted = functools.wraps(read)(lambda *a, f=read, **named: (reads.append(f.__name__), f(*a, **named))[1])
        monkeypatch.setattr(rows, read.__name__, counted)
    draw(0, 1, DRAWN[0])
    assert reads == ["summarize"] * 2  # a half of the rows each


@pytest.mark.parametrize("recipe", DRAWN, ids=str)
def test_on_average_drawn_entries_weigh_what_the_teacher_gives_them(recipe):
    repeats = 400
    entries = draw(0, 1, recipe, repeats=repeats)
    weights = torch.zeros(T * repeats, V + 1, dtype=torch.float64)
    weights.scatter_add_(1, entries.ids_TK.where(entries.ids_TK >= 0, V), entries.logprobs_TK.double().exp())
    mean_TV, p_TV, draws = weights[:, :V].view(repeats, T, V).mean(0), dense(2.0).exp(), recipe["draws"] * repeats
    assert ((mean_TV - p_TV).abs() < 5 * (p_TV / draws).sqrt() + 8 / draws).all()


def test_a_samples_draws_depend_on_its_seed_alone():
    a, b = draw(0, 1, DRAWN[0], seed=4), draw(0, 1, DRAWN[0], seed=5)
    half = T // 2
    assert not torch.equal(a.ids_TK[:half], b.ids_TK[:half])
    assert torch.equal(a.ids_TK[:half], draw(0, 1, DRAWN[0], seed=4).ids_TK[:half])
