"""Whatever the shape, ties, empty rows and number of ranks: the dense loss, and the entries of a stable sort."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from megakd.kernels import kd_loss, select_top_k
from tests.kernels.dense import PAIRS, dense_loss, dense_targets
from tests.kernels.threads import run_threads

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@st.composite
def cases(draw):
    vocabulary = draw(st.integers(1, 70))
    return dict(
        tokens=draw(st.integers(0, 4)),
        vocabulary=vocabulary,
        top_k=draw(st.integers(1, vocabulary)),
        ranks=draw(st.sampled_from([1, 1, 2, 3, 5])),
        padding=draw(st.integers(0, 9)),
        dtype=draw(st.sampled_from(DTYPES)),
        step=draw(st.sampled_from([0.0, 0.25, 2.0])),  # logits are rounded to multiples of it: many ties
        scale=draw(st.sampled_from([0.0, 1.0, 6.0])),
        seed=draw(st.integers(0, 2**31)),
        pair=draw(st.sampled_from(PAIRS)),
        temperature=draw(st.sampled_from([1.0, 0.5, 3.0])),
        student_temperature=draw(st.sampled_from([None, 1.0, 2.0])),
        ce_weight=draw(st.sampled_from([0.0, 0.3])),
        gather=draw(st.booleans()),
        in_place=draw(st.booleans()),
    )


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(cases())
def test_any_case(case):
    generator = torch.Generator().manual_seed(case["seed"])
    shape = (case["tokens"], case["vocabulary"])
    student, teacher = (case["scale"] * torch.randn(2, *shape, generator=generator)).to(case["dtype"])
    if case["step"]:
        teacher = (teacher / case["step"]).round() * case["step"]
    labels = torch.randint(0, case["vocabulary"], shape[:1], generator=generator)
    fate = torch.randint(0, 4, shape[:1], generator=generator)  # of a row: 0 masked, 1 without entries, otherwise usual
    labels[fate == 0] = -100
    on_T = fate != 0
    divergence, tail = case["pair"]
    options = dict(divergence=divergence, tail=tail, ce_weight=case["ce_weight"])
    ids, log_p, log_tail = dense_targets(teacher, case["top_k"], case["temperature"])

    def work(shard, student_TW, teacher_TW):
        targets = select_top_k(teacher_TW, case["top_k"], shard, case["temperature"], gather=case["gather"])
        targets.check()
        found = targets.ids_TK.clone()
        targets.ids_TK[fate == 1], targets.logprobs_TK[fate == 1], targets.log_tail_T[fate == 1] = -1, -torch.inf, 0
        student_TW[~on_T] = torch.nan
        whole = student_TW.requires_grad_() * 1
        outputs = kd_loss(whole, targets, labels, shard, student_temperature=case["student_temperature"],
                          inplace_backward=case["in_place"], **options)  # fmt: skip
        outputs.loss_T.sum().backward()
        assert (student_TW.grad[:, shard.real_width :] == 0).all() and (student_TW.grad[~on_T] == 0).all()
        return found, [part.detach() for part in outputs], student_TW.grad[:, : shard.real_width]

    ranks = run_threads(case["ranks"], (student, teacher), work, padding=case["padding"])
    found = torch.cat([r[0] for r in ranks], 1) if not case["gather"] else ranks[0][0]
    assert torch.equal(found[found >= 0].view(shape[0], case["top_k"]), ids)
    assert all(torch.equal(a, b) for r in ranks for a, b in zip(r[1], ranks[0][1], strict=True))

    truth = student.double().requires_grad_()
    students = case["student_temperature"] or case["temperature"]
    used = (fate[on_T] != 1).double()
    ce_weight = options.pop("ce_weight")
    _, kd, ce, m, q = dense_loss(
        truth[on_T], ids[on_T], log_p[on_T], log_tail[on_T], labels[on_T], temperature=students, **options
    )
    want = students**2 * kd * used + ce_weight * ce
    want.sum().backward()
    for got, true in zip(ranks[0][1], (want, kd * used, ce, m * used, q * used), strict=True):
        assert_close(got[on_T].double(), true.detach(), atol=2e-5, rtol=1e-5)
    eps = torch.finfo(case["dtype"]).eps if case["dtype"] != torch.float32 else 1e-5
    smallest = 6e-8 if case["dtype"] == torch.float16 else 0  # half of its denormals' spacing, and more
    assert_close(torch.cat([r[2] for r in ranks], 1).double(), truth.grad, atol=3e-5 + smallest, rtol=eps)
