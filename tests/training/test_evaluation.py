"""`megakd evaluate`: every figure against dense float64, at any layout, of several models side by side."""

import json
import math

import pytest

from tests.ranks import run_ranks
from tests.training import runs


@pytest.fixture(scope="module")
def models(folder, tmp_path_factory):
    """(teacher, student): run folders of two models that have learnt something."""
    made = []
    for name, width, steps in (("teacher", 48, 40), ("student", 32, 10)):
        made.append(tmp_path_factory.mktemp(name))
        config = runs.values(folder, made[-1], student__model__hidden_size=width, train__steps=steps)
        assert run_ranks(2, runs.train, config) == [None, None]
    return made


def dense(rank, ranks, config):
    """The figures in float64, from the logits of both models over the whole vocabulary."""
    import torch

    from megakd.config import Config
    from megakd.megatron_on_cpu import install

    install("cpu")
    from megakd.assembly.setup import build_setup
    from megakd.models.forward_only import forward_only
    from megakd.models.groups import destroy_groups

    setup = build_setup(Config.from_dict(config), torch.device("cpu"))
    rows = []
    for micro_batches in setup.validation_batches():
        for micro_batch in micro_batches:
            logits = [
                forward_only(gpt, [micro_batch], lambda h, m, gpt=gpt: gpt.logits(h, m.rows_T), setup.groups)[0]
                for gpt in (setup.student, setup.teacher.gpt)
            ]
            rows.append((*(x[:, : runs.PIECES].double().log_softmax(1) for x in logits), micro_batch.labels_T))
    q, p, labels = (torch.cat(part) for part in zip(*rows, strict=True))
    tokenizer = setup.tokenizer
    spelled = b"".join(b"" if tokenizer.is_special(i) else tokenizer.id_to_bytes(i) for i in labels.tolist())
    nll = -q.gather(1, labels[:, None])
    common = [len({*a} & {*b}) / 5 for a, b in zip(q.topk(5).indices.tolist(), p.topk(5).indices.tolist(), strict=True)]
    confidence, guess = q.exp().max(1)
    gaps = [
        abs(float((confidence - (guess == labels).double())[(confidence * 15).long().clamp(max=14) == b].sum()))
        for b in range(15)
    ]
    destroy_groups()
    return {
        "ce": float(nll.mean()),
        "bits_per_byte": float(nll.sum()) / math.log(2) / len(spelled),
        "forward_kl": float((p.exp() * (p - q)).sum(1).mean()),
        "reverse_kl": float((q.exp() * (q - p)).sum(1).mean()),
        "teacher_ce": float(-p.gather(1, labels[:, None]).mean()),
        "agreement": float((guess == p.argmax(1)).double().mean()),
        "top5_agreement": sum(common) / len(common),
        "teacher_mass": float(p.exp().topk(7).values.sum(1).mean()),
        "accuracy": float((guess == labels).double().mean()),
        "ece": sum(gaps) / len(labels),
        "tokens": len(labels),
    }


def evaluate(tmp_path, ranks, config, *flags):
    launch = runs.by_hand(tmp_path, ranks, "evaluate", config, *flags)
    printed = [process.communicate(120)[0] for process in launch]
    assert all(process.returncode == 0 for process in launch), printed
    return printed[0]


WIDER = {"teacher__parallel": {"tp": 2}}


@pytest.mark.parametrize(("ranks", "layout"), [(2, {"parallel__tp": 2}), (4, {"parallel__pp": 2, **WIDER})])
def test_figures_are_those_of_dense_float64(folder, models, tmp_path, ranks, layout):
    teacher, student = models
    config = runs.values(folder, student, teacher__checkpoint=str(teacher), loss={"top_k": 7})
    config["student"] = {"checkpoint": str(student)}
    (wanted,) = run_ranks(1, dense, config)
    assert wanted["forward_kl"] > 0.05 and abs(wanted["forward_kl"] - wanted["reverse_kl"]) > 0.01
    config = runs.values(folder, student, teacher__checkpoint=str(teacher), loss={"top_k": 7}, **layout)
    printed = evaluate(tmp_path, ranks, config, "--json")
    found = json.loads(printed.splitlines()[-1])
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=2e-5, abs=1e-6), name
    assert found["tokens_per_second"] > 0
    kept = json.loads((student / "evaluations.jsonl").read_text().splitlines()[-1])
    assert kept == found


def figures(rank, ranks, config, path):
    """What `megakd evaluate` finds of a model, without a launch."""
    from megakd.config import Config
    from megakd.megatron_on_cpu import install

    install("cpu")
    from megakd.runs.evaluate import evaluate

    found = evaluate(Config.from_dict(config), str(path), runs.OneOfThePool(rank))
    return {name: value for name, value in found.items() if name in ("ce", "kd", "forward_kl", "ece", "agreement")}


def test_sharded_models_are_judged_as_whole_ones_are(folder, models, tmp_path):
    teacher, student = models
    common = {"teacher__checkpoint": str(teacher), "loss": {"top_k": 7}}
    got, want = (
        run_ranks(2, figures, runs.values(folder, tmp_path, **common, **layout), student)
        for layout in ({"parallel__fsdp": "both"}, {})
    )
    assert len(want[0]) == 5 and want[0]["forward_kl"] > 0.05 and got == [pytest.approx(want[0], rel=2e-5)] * 2


def test_several_models_side_by_side(folder, models, tmp_path):
    """A table with a line for each; the teacher's own distance from itself is none; nothing is appended."""
    teacher, student = models
    config = runs.values(folder, tmp_path / "run", teacher__checkpoint=str(teacher), log__progress=False)
    picture = tmp_path / "reliability.png"
    flags = ("--model", str(teacher), "--model", str(student), "--reliability", str(picture))
    printed = evaluate(tmp_path, 1, config, *flags)
    heading, first, second = printed.splitlines()[-3:]
    assert heading.startswith("model") and "KL(t, s)" in heading and "bits/byte" in heading
    assert first.startswith(str(teacher)) and second.startswith(str(student))
    assert first.count("100.0%") >= 2 and " 0.0000" in first, first  # both agreements; both KLs
    assert "100.0%" not in second.partition("  ")[2] and " 0.0000" not in second, second
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_none(folder, models, tmp_path):
    config = runs.values(folder, tmp_path / "run", teacher__checkpoint=str(models[0]))
    (process,) = runs.by_hand(tmp_path, 1, "evaluate", config, "--model", str(tmp_path / "nothing"))
    printed = process.communicate(60)[0]
    assert process.returncode == 1 and "CheckpointError" in printed and "Traceback" not in printed
