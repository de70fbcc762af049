"""The bar that a teacher has to take: counting the tokens of its first batch."""

import math
import types

import pytest
import torch

from megakd.errors import TrainingError
from megakd.training import teacher_check
from megakd.training.teacher_check import TeacherCheck, counted_nats


def test_counting_is_the_entropy_in_a_large_batch_and_a_guess_in_one_without_repetition():
    shares_V = torch.tensor([0.5, 0.25, 0.125, 0.125, 0.0])
    entropy = -sum(p * math.log(p) for p in shares_V.tolist() if p)
    assert counted_nats((shares_V * 8e6).long()) == pytest.approx(entropy, rel=1e-5)
    assert counted_nats(torch.eye(97, dtype=torch.long)[:13].sum(0)) == pytest.approx(math.log(97))
    assert counted_nats(torch.tensor([1, 0, 0])) == pytest.approx(math.log(3)), "one token alone"


def test_counting_does_not_see_the_token_that_it_predicts():
    """Brute force: every token is left out in turn."""
    counts_V = torch.tensor([7, 3, 1, 1, 0, 2, 0, 1])
    V, total, once = len(counts_V), int(counts_V.sum()), 3 / 15
    expected = 0.0
    for count in counts_V.tolist():
        for _ in range(count):
            expected -= math.log((1 - once) * (count - 1) / (total - 1) + once / V)
    assert counted_nats(counts_V) == pytest.approx(expected / total)


@pytest.mark.parametrize(
    ("teacher", "student", "fresh", "said"),
    [
        (1.0, 1.2, True, None),
        (1.0, 0.96, True, None),
        (1.0, 0.94, True, "has nothing to teach"),
        (1.0, 0.5, False, None),
        (1.5, 9.0, True, "knows nothing"),
        (math.inf, 9.0, True, "knows nothing"),
        (None, 0.5, True, None),
    ],
)
def test_what_is_refused(teacher, student, fresh, said, monkeypatch):
    monkeypatch.setattr(teacher_check.dist, "all_reduce", lambda counts, group: counts.mul_(1000))
    batches = [types.SimpleNamespace(labels_T=torch.tensor(labels)) for labels in ([0, 1, 1, 2], [0, 1, 0, 2])]
    check = TeacherCheck(batches, 5, "there", fresh, None)  # 3/8, 3/8, 2/8: 1.082 nats
    metrics = {"ce": student} | ({} if teacher is None else {"teacher_ce": teacher})
    if said is None:
        return check(metrics)
    with pytest.raises(TrainingError, match=rf"(?s)there {said}.*teacher.allow_weak=true"):
        check(metrics)
