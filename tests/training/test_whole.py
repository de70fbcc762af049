"""`loss.targets: whole`: the same training as with all entries kept, at any layout, and all that goes with a run."""

import json

import pytest
from torch.testing import assert_close

from megakd.errors import ConfigError, TrainingError
from tests.ranks import run_ranks
from tests.training import runs, small
from tests.training.test_head import gradients
from tests.training.test_step import STEPS, assert_same_curve

BLOCKS = 2 * 7 * 1024 * 4  # bytes of logits: 7 tokens of each model at a time, at tp = 1


def loss(targets, **changes):
    """Changes of small's config; all entries of the vocabulary are kept where entries are."""
    return {f"loss__{name}": value for name, value in ({"targets": targets, "top_k": small.VOCAB} | changes).items()}


def curve(ranks, tp, pp, size, section, **changes):
    curves = run_ranks(ranks, small.curve, tp, pp, size, STEPS, section | changes)
    assert all(each == curves[0] for each in curves)
    return curves[0]


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_whole_is_top_k_of_all_of_them_at_any_layout(divergence):
    want = curve(1, 1, 1, 8, loss("top_k", divergence=divergence))
    for metrics in want:
        assert metrics["teacher_mass"] == pytest.approx(1)
    section = loss("whole", divergence=divergence, logits_memory_budget_bytes=BLOCKS)
    layouts = [(1, 1, 1, 8, {}), (2, 2, 1, 4, {"parallel__sp": True}), (2, 1, 2, 2, {}), (4, 2, 1, 1, {})]
    layouts += [(2, 1, 1, 2, {"parallel__fsdp": "both", "parallel__fsdp_by": whose}) for whose in ("torch", "megatron")]
    for ranks, tp, pp, size, changes in layouts:
        assert_same_curve(curve(ranks, tp, pp, size, section, **changes), want)


@pytest.mark.parametrize(("ranks", "tp", "pp"), [(1, 1, 1), (2, 2, 1), (2, 1, 2)])
@pytest.mark.parametrize("student", [{}, {"tie_embeddings": False, "logit_softcap": 3.0}])
def test_every_gradient_is_that_of_all_entries(ranks, tp, pp, student):
    def found(section):
        return run_ranks(ranks, gradients, tp, pp, True, section, student)

    for (got, _), (want, _) in zip(found(loss("whole")), found(loss("top_k")), strict=True):
        assert got.keys() == want.keys() and got
        for name, want_grad in want.items():
            assert_close(got[name], want_grad, rtol=1e-4, atol=2e-5 * want_grad.abs().max().item(), msg=name)


def test_ramps_and_another_students_temperature():
    ramp = {"temperature": {"to": 1.0, "steps": 3}}
    for changes in ({"ramps": ramp}, {"student_temperature": 1.5}, {"kd_weight": 0.0}):
        assert_same_curve(curve(1, 1, 1, 8, loss("whole", **changes)), curve(1, 1, 1, 8, loss("top_k", **changes)))


def test_draws_are_a_samples_own_in_any_batch_at_one_tp():
    section = loss("sampled", draws=30)
    blocks = section | {"loss__logits_memory_budget_bytes": 7 * 1024 * 4}
    one = curve(1, 1, 1, 8, section)
    for ranks, pp, size, how in [(2, 1, 2, section), (2, 2, 1, section), (1, 1, 8, blocks)]:
        assert_same_curve(curve(ranks, 1, pp, size, how), one)
    two = curve(2, 2, 1, 8, section)
    assert_same_curve(curve(4, 2, 1, 2, blocks, parallel__sp=True), two)


def drawn(rank, ranks, draws):
    """kd of one batch in three steps whose updates are thrown away, and that of the whole distribution."""
    with small.layout() as groups:
        found = []
        for section in (loss("sampled", draws=draws), loss("whole")):
            run = small.student_step(small.config(**section), groups)
            run.optimizer.step = lambda: (True, 1.0, None)
            found.append([run(small.batch(0, groups, 8), step=n, measure=True) for n in (1, 2, 1)])
        return [[metrics[name] for metrics in found[0]] + [found[1][0][name]] for name in ("kd", "teacher_ce")]


def test_draws_are_unbiased_and_a_step_draws_the_same_again():
    kd, teacher_ce = run_ranks(1, drawn, 5000)[0]
    first, second, again, whole = kd
    assert first == again != second
    assert abs(first - whole) < 0.02 * whole and abs(second - whole) < 0.02 * whole
    assert teacher_ce == pytest.approx([teacher_ce[-1]] * 4)


def broken_teacher(rank, ranks):
    with small.layout(2, 1) as groups:
        run = small.student_step(small.config(2, 1, **loss("whole")), groups)
        run.teacher.gpt.decoder.final_layernorm.weight.fill_(float("inf"))
        with pytest.raises(TrainingError, match="the online teacher: the teacher's logits hold NaN or infinity in"):
            run(small.batch(0, groups, 8), step=1, measure=False)


def test_a_teacher_that_is_not_finite_is_named_on_every_rank():
    run_ranks(2, broken_teacher)


def test_what_it_excludes():
    for changes, message in [
        (loss("whole", tail="drop"), "loss.tail: drop, but targets whole have no tail"),
        (loss("most"), "loss.targets"),
        (loss("sampled"), "loss.draws: missing, but targets is sampled"),
        (loss("top_k", draws=5), "loss.draws: 5, but targets is top_k"),
        (loss("sampled", draws=5, divergence="jsd"), "loss.divergence: jsd, but draws give forward_kl only"),
        (loss("sampled", draws=5) | {"parallel__cp": 2}, "loss.targets: sampled, but parallel.cp = 2"),
    ]:
        with pytest.raises(ConfigError, match=message):
            small.config(**changes)


def test_a_whole_run_validates_exactly_records_a_step_and_goes_on(folder, teacher, tmp_path):
    section = {"targets": "whole", "top_k": 5, "temperature": 2.0, "divergence": "reverse_kl"}
    changes = dict(loss=section, eval__every_steps=4, train__steps=4)
    config = runs.distil(folder, teacher, tmp_path, **changes, run__record_steps=[2], checkpoint__every_steps=2)
    assert run_ranks(2, runs.train, config) == [None, None]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "validation"][-1]
    assert last["teacher_mass"] == pytest.approx(1) and last["kd"] != pytest.approx(last["reverse_kl"])
    assert last["reverse_kl"] > 0 and 0 < last["agreement"] < 1
    trained = [line["kd"] for line in lines if line["kind"] == "train"]
    assert len(trained) == 4 and trained[-1] < trained[0]
    assert replayed(config, tmp_path) == "no difference"


def replayed(config, tmp_path):
    """What replaying the recorded step on one rank, without the cut of the vocabulary, finds."""
    from tests.training.test_replay import at, record_of, replay

    other = at(config, tmp_path / "again", micro_batch_size=4, tp=1)
    text, differs = run_ranks(1, replay, str(record_of(config, 2)), other)[0]
    return text if differs else "no difference"
