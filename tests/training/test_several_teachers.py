"""Several live teachers: a step is the sum of its single-teacher parts, at any layout; whole runs by data source."""

import dataclasses

import pytest
import torch

from tests.ranks import run_ranks
from tests.training import runs, small
from tests.training.test_whole import BLOCKS, loss

WEIGHTS = (0.7, 1.9)
OF_SAMPLES = (0, 1, 1, 0, 1, 0, 1, 1)  # the teacher of each of small's samples
WHOLE = loss("whole", divergence="jsd", logits_memory_budget_bytes=BLOCKS)
FUSED = {"loss__logits_memory_budget_bytes": 7 * 1024 * 4}


def batch(groups, size, only=None):
    """small's batch with the teachers of its samples; `only`: the other teacher's are not supervised."""
    from megakd.kernels.vocab import MASKED

    found, first = [], groups.dp.rank() * (8 // groups.dp.size())
    for micro_batch in small.batch(0, groups, size):
        labels_BS = micro_batch.labels_BS.clone()
        teachers = list(OF_SAMPLES[first : first + len(labels_BS)])
        for row, teacher in enumerate(teachers):
            if only not in (None, teacher):
                labels_BS[row] = MASKED
            if (labels_BS[row] == MASKED).all():
                teachers[row] = -1
        found.append(dataclasses.replace(micro_batch, labels_BS=labels_BS, teachers=tuple(teachers)))
        first += len(labels_BS)
    return found


def build(config, groups, wider=None):
    """A student's step with two teachers of different widths; the teachers alone."""
    from megakd.assembly.setup import teacher_of

    run = small.student_step(config, groups, teacher=False)
    sections = small.teacher_section(), small.teacher_section(hidden_size=40, logit_softcap=5.0)
    gpts = [
        small.build(section, config, groups, 2 + n, teacher=True, wider=wider) for n, section in enumerate(sections)
    ]
    run.teacher, run.loss = teacher_of(config, gpts, config.loss, groups, wider), config.loss
    return run, run.teacher.teachers


def named(changes):
    """small's config with teachers, which are built by hand."""
    teachers = [
        {"name": name, "checkpoint": "unused", "data": [name], "weight": weight}
        for name, weight in zip("ab", WEIGHTS, strict=True)
    ]
    config = {"teacher__checkpoint": None, "data__train": ["a", "b"]} | changes
    return config | {"teachers": teachers}


def config_of(tp, pp, changes):
    """As small.config, which knows sections alone."""
    from megakd.config import Config

    changes = named(changes)
    teachers = changes.pop("teachers")
    alone = {"teacher__checkpoint": "unused", "data__train": "unused"}
    values = small.config(tp, pp, **(changes | alone)).model_dump(mode="json")
    values["teacher"]["checkpoint"], values["data"]["train"] = None, ["a", "b"]
    return Config.from_dict(values | {"teachers": teachers})


def steps(rank, ranks, tp, pp, size, changes):
    """Gradients times tokens and metrics of the step with both teachers, and of each of its parts."""
    with small.layout(tp, pp) as groups:
        config = config_of(tp, pp, changes)
        run, teachers = build(config, groups)
        both, found = run.teacher, []

        def derive(only):
            metrics = run.derive(batch(groups, size, only), step=1, measure=True)
            gradients = {name: p.main_grad.detach() * metrics["tokens"] for name, p in run.gpt.named_parameters()}
            found.append((gradients, metrics))

        derive(None)
        for number, weight in enumerate(WEIGHTS):
            run.teacher = teachers[number]
            run.loss = config.loss.model_copy(update={"kd_weight": config.loss.kd_weight * weight})
            derive(number)
        assert both.names == ["a", "b"]
        return found


@pytest.mark.parametrize(
    ("ranks", "tp", "pp", "size", "changes"),
    [
        (1, 1, 1, 4, {}),
        (2, 2, 1, 4, FUSED | {"parallel__sp": True}),
        (2, 2, 1, 8, WHOLE),
        (2, 1, 2, 2, WHOLE),
        (2, 1, 1, 2, {"teacher__offload": True}),
    ],
)
def test_a_step_is_the_sum_of_its_single_teacher_parts(ranks, tp, pp, size, changes):
    for both, *parts in run_ranks(ranks, steps, tp, pp, size, changes):
        (gradients, metrics), alone = both, [metrics for _, metrics in parts]
        for name, got in gradients.items():
            want = sum(part[name] for part, _ in parts)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-6 * float(want.abs().max()), msg=name)
        assert metrics["tokens"] == sum(one["tokens"] for one in alone)
        for key in ("loss", "kd", "ce", "teacher_ce", "agreement", "teacher_mass"):
            want = sum(one[key] * one["tokens"] for one in alone) / metrics["tokens"]
            assert metrics[key] == pytest.approx(want, rel=1e-5), key
        for name, one in zip("ab", alone, strict=True):
            for key in ("kd", "ce", "teacher_ce", "agreement", "tokens"):
                assert metrics[f"{name}/{key}"] == pytest.approx(one[key], rel=1e-5), (name, key)


def in_step(rank, ranks):
    """Metrics where the teachers' weights are cut over two ranks, of which the first has no sample of the second: not
    at all, by FSDP, and by a tp of theirs."""
    with small.layout() as groups:
        found = []
        for changes in ({}, {"parallel__fsdp": "teacher"}, {"teacher__parallel": {"tp": 2}}):
            config = config_of(1, 1, changes)
            mine = batch(groups, 2)
            assert rank == 1 or {t for m in mine for t in m.teachers} == {-1, 0}
            with small.wider_teacher(config, groups) as wider:
                run, _ = build(config, groups, wider)
                metrics = run.derive(mine, step=1, measure=True)
            found.append({name: value for name, value in metrics.items() if isinstance(value, float)})
        return found


def test_teachers_whose_weights_are_cut_run_on_all_ranks_as_often():
    for whole, *cut in run_ranks(2, in_step):
        assert cut == [pytest.approx(whole, rel=1e-5)] * 2 and whole["b/tokens"] > 0


@pytest.fixture(scope="module")
def teachers(folder, tmp_path_factory):
    """Two checkpoints of one run."""
    run_dir = tmp_path_factory.mktemp("teachers")
    model = {"student__model__hidden_size": 48, "train__steps": 24, "data__validation": None}
    config = runs.values(folder, run_dir, **model, checkpoint__every_steps=12)
    assert run_ranks(1, runs.train, config) == [None]
    return [str(path) for path in sorted((run_dir / "checkpoints").glob("step*"))][-2:]


def distil(folder, teachers, run_dir, weights=(1.0, 2.0), **changes):
    """Two sources of training data, and two that are held out."""
    a, b = f"{folder}/train", f"{folder}/validation"
    held_out = {}
    for name, source in (("a", "errors.py"), ("b", "targets.py")):
        path = folder / f"{name}.txt"
        if not path.exists():
            path.write_text((runs.ROOT / "megakd" / source).read_text("utf-8")[:1200], "utf-8")
        held_out[name] = str(path)
    sections = [
        {"name": name, "checkpoint": checkpoint, "data": [source, held_out[name]], "weight": weight}
        for name, checkpoint, source, weight in zip("ab", teachers, (a, b), weights, strict=True)
    ]
    defaults = {"loss": {"top_k": 30, "ce_weight": 0.2}, "train__steps": 4, "teachers": sections, "data__workers": 1}
    defaults |= {"data__train": [0.6, a, 0.4, b], "data__validation": [held_out["b"], held_out["a"]]}
    defaults |= {"eval__samples": None}
    return runs.values(folder, run_dir, **(defaults | changes))


def lines(config, kind="train"):
    return runs.lines(config["run"]["dir"], kind)


def test_a_run_is_the_same_at_any_layout_goes_on_and_validates_by_teacher(folder, teachers, tmp_path):
    one = distil(folder, teachers, tmp_path / "one", train__micro_batch_size=4)
    assert run_ranks(1, runs.train, one) == [None]
    (validation,) = lines(one, "validation")
    assert validation["tokens"] == validation["a/tokens"] + validation["b/tokens"] > 0
    kd = sum(validation[f"{name}/kd"] * validation[f"{name}/tokens"] for name in "ab") / validation["tokens"]
    assert validation["kd"] == pytest.approx(kd, rel=1e-6)
    weighted = (
        0.2 * validation["ce"]
        + sum(weight * validation[f"{name}/kd"] * validation[f"{name}/tokens"] for name, weight in (("a", 1), ("b", 2)))
        / validation["tokens"]
    )
    assert validation["loss"] == pytest.approx(weighted, rel=1e-5)
    for number, changes in enumerate(({"parallel__tp": 2}, {"parallel__pp": 2, "train__micro_batch_size": 1}, {})):
        other = distil(folder, teachers, tmp_path / f"{number}", **changes)
        assert run_ranks(2, runs.train, other) == [None, None]
        runs.assert_close(lines(other), lines(one), rel=1e-4, abs=1e-6)
        runs.assert_close(lines(other, "validation"), [validation], rel=1e-4, abs=1e-6)
    again = distil(folder, teachers, tmp_path / "again", train__micro_batch_size=4, run__stop_after=2)
    assert run_ranks(1, runs.train, again) == [None]
    del again["run"]["stop_after"]
    assert run_ranks(1, runs.train, again) == [None]
    assert lines(again) == lines(one)
    again["teachers"][1]["weight"] = 3.0
    (failure,) = run_ranks(1, runs.train, again)
    assert "holds a run with other settings" in failure and "teachers: was [{'name': 'a'" in failure


def test_one_teacher_under_two_names_is_one_teacher(folder, teachers, tmp_path):
    for targets in ({"top_k": 30}, {"targets": "whole", "divergence": "reverse_kl"}):
        (tmp_path / targets.get("targets", "top_k")).mkdir()
        where = tmp_path / targets.get("targets", "top_k")
        two = distil(folder, [teachers[1]] * 2, where / "two", (1.0, 1.0), loss=targets, train__steps=2)
        one = distil(folder, teachers, where / "one", loss=targets, train__steps=2)
        del one["teachers"]
        one["teacher"] = {"checkpoint": teachers[1]}
        for config in (two, one):
            assert run_ranks(1, runs.train, config) == [None]
        for kind in ("train", "validation"):
            common = [{k: v for k, v in line.items() if "/" not in k} for line in lines(two, kind)]
            runs.assert_close(common, lines(one, kind), rel=2e-5, abs=1e-6)


def test_teachers_that_do_not_fit_are_refused_by_name(folder, teachers, tmp_path):
    config = distil(folder, [teachers[0], str(tmp_path / "nothing")], tmp_path / "run")
    (failure,) = run_ranks(1, runs.train, config)
    assert failure.startswith("CheckpointError") and "nothing" in failure
    other = tmp_path / "other"
    other.mkdir()
    from megakd.runs.prepare import main

    source = str(runs.ROOT / "megakd" / "cli.py")
    main(["tokenizer", "--input", source, "--output", f"{other}/tokenizer.model", "--vocab-size", "350"])
    for name in ("train", "validation"):
        main(["text", "--input", source, "--tokenizer", f"{other}/tokenizer.model", "--output", f"{other}/{name}"])
    assert run_ranks(1, runs.train, runs.values(other, tmp_path / "stranger", train__steps=1)) == [None]
    config = distil(folder, [teachers[0], str(tmp_path / "stranger")], tmp_path / "run")
    (failure,) = run_ranks(1, runs.train, config)
    assert "stranger" in failure and "was trained with tokenizer" in failure and "hint: " in failure
