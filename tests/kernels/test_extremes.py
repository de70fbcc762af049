"""Every divergence and tail on rows that go to extremes, value and gradient, against 60 digits."""

import math

import mpmath
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megakd.divergences import DIVERGENCES
from megakd.kernels import VocabShard, dense_kd_loss, kd_loss
from megakd.targets import TeacherTargets
from tests.kernels.dense import PAIRS
from tests.kernels.exact import value_and_gradient
from tests.kernels.threads import run_threads

LEVELS = [-1e4, -800.0, -300.0, -90.0, -20.0, -1.0, 0.0, 0.5, 3.0, 20.0, 90.0, 300.0, 800.0, 1e4]
TEMPERATURES = [0.05, 0.5, 1.0, 2.0, 50.0]
SHARES = [1e-12, 1e-6, 1e-3, 0.1, 0.5, 0.9, 1 - 1e-3, 1 - 1e-6, 1 - 1e-12]


def logit(rules_out):
    usual = st.floats(-6, 6, width=32)
    levels = st.sampled_from([*LEVELS, -math.inf] if rules_out else LEVELS)
    return st.one_of(usual, usual, levels)


@st.composite
def rows(draw, whole=False):
    """One token: a student's and a teacher's logits over a few ids, and which of these are entries."""
    size = draw(st.integers(2, 7))
    student = draw(st.lists(logit(True), min_size=size, max_size=size))
    assume(max(student) > -math.inf)
    temperature = draw(st.sampled_from(TEMPERATURES))
    row = dict(
        student=student,
        teacher=draw(st.lists(logit(False), min_size=size, max_size=size)),
        temperature=temperature,
        parameter=draw(st.sampled_from(SHARES)),
        ranks=draw(st.sampled_from([1, 1, 2, 3])),
        ids=list(range(size)) if whole else sorted(draw(st.sets(st.integers(0, size - 1), max_size=size))),
        certain=draw(st.sampled_from([None, None, None, 1e-9])),  # what mass is left to the tail
    )
    # The float32 log-probabilities are the teacher's word, for kernel and truth alike.
    log_p = (torch.tensor(row["teacher"], dtype=torch.float64) / temperature).log_softmax(0)
    outside = torch.ones(size, dtype=torch.bool)
    outside[row["ids"]] = False
    entries, log_tail = log_p[row["ids"]], log_p[outside].logsumexp(0)
    if row["certain"] and row["ids"] and len(row["ids"]) < size:
        entries, log_tail = entries.log_softmax(0) + math.log1p(-row["certain"]), torch.tensor(math.log(row["certain"]))
    return row | dict(log_p=entries.float(), log_tail=log_tail.float())


def magnitudes(name, share, p, q):
    """The natural sizes of value and gradient, times logs that are as long as float32 rounds them."""
    logs = sum(float(w) * (abs(log(x)) + abs(log(y))) for x, y in zip(p, q, strict=True) for w in (x, y) if w > 0)
    rest = 1 - share
    apart = sum(float(y * abs(x - y) / (share * x + rest * y)) for x, y in zip(p, q, strict=True) if y > 0)
    value, gradient = {
        "jsd": (min(share, rest), share * rest),
        "skew_forward_kl": (rest, rest**2 * apart),
        "skew_reverse_kl": (rest, rest**2),
    }.get(name, (1.0, 1.0))
    return value * (1 + logs), gradient * (1 + logs)


def log(x):
    return float(mpmath.log(x)) if x > 0 else 0.0


def check(row, name, got, got_grad, truth):
    value, gradient, (p, q) = truth
    assert not math.isnan(got), (name, row)
    if got == math.inf and any(x > 0 and y == 0 for x, y in zip(p, q, strict=True)):
        return  # a tail is compared in float64, where less is 0
    if gradient is None:
        assert got == math.inf, (name, row, got)
        return
    if name == "tvd":  # has no gradient where p = q
        assume(all(abs(x - y) > 1e-4 * (x + y) for x, y in zip(p, q, strict=True) if x + y > 1e-30))
    sizes = magnitudes(name, row["parameter"], p, q)
    allowed = 4e-6 * (sizes[0] + abs(float(value))) + grain(row["log_p"])
    assert abs(got - float(value)) <= allowed, (name, row, got, float(value))
    largest = max((abs(float(g)) for g in gradient), default=0.0)
    for j, (ours, true) in enumerate(zip(got_grad.tolist(), gradient, strict=True)):
        true = 0.0 if row["student"][j] == -math.inf else float(true)
        assert abs(ours - true) <= 4e-6 * sizes[1] + 2e-5 * largest + 1e-37, (name, row, j, ours, true)


def grain(log_p):
    """What the logarithm of the teacher's mass in S cannot tell: that mass is a float32, subnormal below 2**-126."""
    mass = float(log_p.double().exp().sum())
    return 2.0**-149 / mass if 0 < mass < 2.0**-126 else 0.0


def loss_and_gradient(row, name, tail, device):
    """kd_T and the gradient with respect to student / temperature, of ranks that are threads."""
    student, label = torch.tensor([row["student"]], device=device), torch.tensor([0], device=device)
    ids, log_p = torch.tensor([row["ids"]], dtype=torch.int64), row["log_p"][None]
    used = log_p > -math.inf
    targets = TeacherTargets(ids.where(used, -1), log_p, row["log_tail"][None], row["temperature"]).to(device)
    named = {DIVERGENCES[name].parameter or "beta": row["parameter"]}

    def work(shard, student_TW):
        leaf = student_TW.requires_grad_()
        out = kd_loss(leaf, targets, label, shard, divergence=name, tail=tail, **named)
        out.loss_T.sum().backward()
        assert out.loss_T.isnan() or out.loss_T.isinf() or leaf.grad[:, : shard.real_width].isfinite().all(), row
        return out.kd_T.detach(), leaf.grad[:, : shard.real_width]

    if row["ranks"] == 1:
        ranks = [work(VocabShard(0, len(row["student"]), len(row["student"])), student)]
    else:
        ranks = run_threads(row["ranks"], (student,), work)
    assert all(torch.equal(kd_T, ranks[0][0]) for kd_T, _ in ranks), (name, row, ranks)
    return float(ranks[0][0]), torch.cat([grad for _, grad in ranks], 1)[0].double().cpu() / row["temperature"]


def compare_top_k(row, name, tail, device="cpu"):
    entries = {j: x for j, x in zip(row["ids"], row["log_p"].tolist(), strict=True) if x > -math.inf}
    truth = value_and_gradient(
        name, tail, row["parameter"], row["temperature"], row["student"], entries, float(row["log_tail"])
    )
    check(row, name, *loss_and_gradient(row, name, tail, device), truth)


@pytest.mark.parametrize("name, tail", PAIRS)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(rows())
def test_top_k(name, tail, row):
    compare_top_k(row, name, tail)


@pytest.mark.parametrize("name", DIVERGENCES)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(rows(whole=True))
def test_dense(name, row):
    student, teacher = torch.tensor([row["student"]]).requires_grad_(), torch.tensor([row["teacher"]])
    size = len(row["student"])
    named = {DIVERGENCES[name].parameter or "beta": row["parameter"]}
    loss = dense_kd_loss(student, teacher, torch.tensor([0]), VocabShard(0, size, size), divergence=name,
                         temperature=row["temperature"], **named)  # fmt: skip
    loss.loss_T.sum().backward()
    exact_log_p = (teacher[0].double() / row["temperature"]).log_softmax(0).tolist()
    truth = value_and_gradient(
        name, "bucket", row["parameter"], row["temperature"], row["student"], dict(enumerate(exact_log_p)), -math.inf
    )
    check(row, name, float(loss.kd_T.detach()), student.grad[0].double() / row["temperature"], truth)
