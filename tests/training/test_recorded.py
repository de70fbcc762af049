"""A teacher whose hidden states were recorded is the live one: at any layout, temperature and kind of targets."""

import re
import types

import numpy as np
import pytest
import torch

from megakd.cache import CacheReader, read_header
from megakd.cache.verify import verify
from megakd.runs.cache_tools import main
from tests.cache import test_hidden as made
from tests.cache.made import make_sample
from tests.ranks import run_ranks
from tests.runs.test_cache import record
from tests.training import runs

WHOLE = {"targets": "whole", "top_k": 20, "divergence": "jsd", "temperature": 1.7, "ce_weight": 0.2}
RAMP = WHOLE | {"ramps": {"temperature": {"to": 0.8, "steps": 3}}}


@pytest.fixture(scope="module")
def teacher(folder, tmp_path_factory):
    """With an output layer and a soft cap of its own."""
    run_dir = tmp_path_factory.mktemp("teacher")
    model = {"student__model__hidden_size": 48, "student__model__tie_embeddings": False}
    model |= {"student__model__logit_softcap": 9.0, "train__steps": 20, "data__validation": None}
    assert run_ranks(1, runs.train, runs.values(folder, run_dir, **model)) == [None]
    return run_dir


def distil(folder, teacher, run_dir, cache, tp=1, loss=WHOLE, **changes):
    defaults = {"loss": loss, "train__steps": 4, "parallel__tp": tp}
    defaults |= {"teacher": {"checkpoint": str(teacher), "cache": str(cache) if cache else None}}
    return runs.values(folder, run_dir, **(defaults | {"cache": {"mode": "hidden", "codec": "fp32"}} | changes))


@pytest.fixture(scope="module")
def cache(folder, teacher, tmp_path_factory):
    """Recorded on one rank."""
    cache = tmp_path_factory.mktemp("cache")
    assert run_ranks(1, record, distil(folder, teacher, "unused", cache)) == [None]
    return cache


def trained(ranks, config):
    """The lines of a run's training, then that of its validation."""
    assert run_ranks(ranks, runs.train, config) == [None] * ranks
    return [*runs.lines(config["run"]["dir"]), *runs.lines(config["run"]["dir"], "validation")]


@pytest.fixture(scope="module")
def live(folder, teacher, tmp_path_factory):
    """With a ramp of the temperature, which no recording of entries could serve."""
    return trained(1, distil(folder, teacher, tmp_path_factory.mktemp("live"), None, loss=RAMP))


@pytest.mark.parametrize(
    ("ranks", "tp", "changes"),
    [(2, 2, {"parallel__sp": True}), (2, 1, {"parallel__pp": 2}), (2, 1, {"parallel__cp": 2})],
)
def test_recorded_at_tp_1_it_is_the_live_teacher_at_any_layout(
    folder, teacher, cache, live, tmp_path, ranks, tp, changes
):
    config = distil(folder, teacher, tmp_path, cache, tp, RAMP, **changes)
    runs.assert_close(trained(ranks, config), live, rel=3e-5, abs=1e-6)


def test_recorded_at_tp_2_and_dp_2_too_and_a_killed_recording_goes_on(folder, teacher, cache, live, tmp_path):
    config = distil(folder, teacher, tmp_path / "run", tmp_path / "cache", 2, RAMP, train__micro_batch_size=4)
    config["cache"]["shard_samples"] = 9
    assert run_ranks(2, record, config, 3) == [None, None]
    assert not read_header(tmp_path / "cache").finished and (tmp_path / "cache" / "head.json").exists()
    assert run_ranks(4, record, config) == [None] * 4
    header = verify(tmp_path / "cache")
    assert header.rows == read_header(cache).rows == 40
    assert header.head == read_header(cache).head, "an output layer is the same file at every layout"
    config["parallel"]["tp"] = 1
    runs.assert_close(trained(2, config), live, rel=3e-5, abs=1e-6)


def test_in_bfloat16_it_is_the_live_teacher_in_bfloat16_and_8_bits_are_near(folder, teacher, tmp_path):
    changes = {"train__precision": "fp32", "train__steps": 2}
    config = distil(folder, teacher, tmp_path / "live", None, **changes)
    config["teacher"]["precision"] = "bf16"
    want = trained(1, config)
    for codec, close in ((None, 1e-6), ("q8", 2e-3)):
        config = distil(folder, teacher, tmp_path / f"run_{codec}", tmp_path / f"{codec}", **changes)
        config["teacher"]["precision"], config["cache"]["codec"] = "bf16", codec
        assert run_ranks(2, record, config) == [None, None]
        assert read_header(tmp_path / f"{codec}").head.dtype == "bf16"
        got = trained(1, config)
        assert [line["kd"] for line in got] == pytest.approx([line["kd"] for line in want], rel=close)


@pytest.mark.parametrize(
    "loss",
    [
        {"targets": "top_k", "top_k": 11, "divergence": "reverse_kl", "ce_weight": 0.1},
        {"targets": "sampled", "draws": 7, "temperature": 1.3},
    ],
)
def test_entries_and_draws_of_it_are_those_of_the_live_teacher(folder, teacher, cache, tmp_path, loss):
    want = trained(2, distil(folder, teacher, tmp_path / "live", None, 2, loss, train__steps=2))
    got = trained(2, distil(folder, teacher, tmp_path / "run", cache, 2, loss, train__steps=2))
    runs.assert_close(got, want, rel=3e-5, abs=1e-6)


def test_two_caches_in_a_list_are_the_merged_one_to_the_bit(folder, teacher, tmp_path):
    both = [str(tmp_path / "a"), str(tmp_path / "b")]
    for share, path in enumerate(both):
        config = distil(folder, teacher, "unused", path, train__steps=2)
        config["cache"]["share"] = f"{share}/2"
        assert run_ranks(1, record, config) == [None]
    main(["merge", "--output", str(tmp_path / "ab"), *both])
    lines = []
    for name, caches in (("merged", str(tmp_path / "ab")), ("list", both)):
        config = distil(folder, teacher, tmp_path / name, None, train__steps=2)
        config["teacher"]["cache"] = caches
        lines.append(trained(1, config))
    assert lines[0] == lines[1]


def judged(rank, ranks, config, model):
    from megakd.config import Config
    from megakd.megatron_on_cpu import install
    from megakd.runs.evaluate import evaluate

    install("cpu")
    return evaluate(Config.from_dict(config), model, runs.OneOfThePool(rank))


def test_evaluate_is_exact_against_a_recording(folder, teacher, cache, tmp_path):
    student = str(tmp_path / "student")
    loss = {"top_k": 7}
    assert run_ranks(1, runs.train, runs.values(folder, student, train__steps=2)) == [None]
    want, got = (
        run_ranks(2, judged, distil(folder, teacher, tmp_path, where, 2, loss), student)[1] for where in (None, cache)
    )
    for name in ("forward_kl", "reverse_kl", "top5_agreement", "kd", "teacher_ce", "agreement"):
        assert got[name] == pytest.approx(want[name], rel=2e-5), name


def test_what_does_not_go_together_is_refused_by_name(folder, teacher, cache, tmp_path):
    entries = distil(folder, teacher, "unused", tmp_path / "entries", train__steps=1)
    entries["cache"] = {"mode": "top_k"}
    assert run_ranks(1, record, entries) == [None]
    config = distil(folder, teacher, tmp_path, tmp_path / "entries")
    for loss, words in [
        (WHOLE, "loss.targets is whole, but .*entries holds the entries of cache.mode=top_k"),
        ({"targets": "sampled", "draws": 3, "temperature": 1.7}, "loss.targets is sampled, but .*entries"),
        (RAMP | {"targets": "top_k"}, "loss.ramps.temperature is given, but .* was recorded at fixed temperatures"),
    ]:
        config["loss"] = loss
        (failure,) = run_ranks(1, runs.train, config)
        assert failure and re.search(words, failure) and "\nhint: " in failure, failure
    config["teacher"]["cache"], config["loss"] = (
        [str(cache), str(tmp_path / "entries")],
        {"temperature": 1.7, "top_k": 20},
    )
    (failure,) = run_ranks(1, runs.train, config)
    assert re.search(r"CacheError: .*cache\d holds hidden states: True, .*entries hidden states: False", failure), (
        failure
    )
    head = cache / "head.bin"
    good = head.read_bytes()
    try:
        head.write_bytes(good[:500] + bytes([good[500] ^ 1]) + good[501:])
        (failure,) = run_ranks(1, runs.train, distil(folder, teacher, tmp_path, cache))
    finally:
        head.write_bytes(good)
    assert re.search(r"CacheError: the teacher's output layer in .*head\.bin is damaged between", failure), failure


def recorded_by_two(rank, ranks, folder):
    """A micro-batch with samples of two caches that have an output layer each, against what each says alone."""
    from megakd.config import Loss
    from megakd.kernels import VocabShard
    from megakd.models.micro_batch import MicroBatch
    from megakd.teachers.recorded import RecordedTeacher

    class Axis:
        def __init__(self, rank, size):
            self.rank, self.size = (lambda: rank), (lambda: size)

    width = 512
    shard = VocabShard(rank * width, (rank + 1) * width, made.V, torch.distributed.group.WORLD)
    readers = [CacheReader(f"{folder}/{name}") for name in "ab"]
    groups = types.SimpleNamespace(pp=Axis(0, 1))
    loss = Loss.model_validate({"targets": "whole", "top_k": 9})
    teacher = RecordedTeacher(readers, groups, {}, shard=shard, loss=loss, seed=1, device=torch.device("cpu"))
    ids_BS, labels_BS = batch([0, 4, 1, 5])
    (lesson,) = teacher.lessons([MicroBatch(ids_BS, labels_BS)])
    (empty,) = teacher.lessons([MicroBatch(ids_BS, torch.full_like(labels_BS, -100))])
    assert len(empty.gathered().hidden_TH) == 0
    for part in lesson.parts:  # an odd number in one of them
        assert len(part.lesson.hidden_TH.own_PH) == -(-len(part.rows_P) // 2) > 0
    labels_T = labels_BS.T[labels_BS.T != -100]
    selected = lesson.selected(labels_T)
    some_T = torch.tensor([5, 0, 11, 3])
    assert torch.equal(lesson.rows(some_T).logits(), lesson.logits()[some_T])
    return lesson.logits(), selected.label_logprob_T, [len(part.rows_P) for part in lesson.parts], shard.real_width


def batch(numbers):
    """Ids and labels of samples, with every position that is recorded supervised."""
    ids_BS = torch.from_numpy(np.stack([make_sample(number)[0] for number in numbers]))
    labels_BS = torch.full_like(ids_BS, -100)
    for row, number in enumerate(numbers):
        _, mask_S, last_label = make_sample(number)
        following = torch.cat([ids_BS[row, 1:], torch.tensor([last_label])])
        labels_BS[row] = following.where(torch.from_numpy(mask_S), -100)
    return ids_BS, labels_BS


def test_each_sample_of_a_micro_batch_is_taught_by_its_own_caches_output_layer(tmp_path):
    heads = [made.weight(1), made.weight(2)]
    for name, numbers, head in zip("ab", (range(4), range(4, 8)), heads, strict=True):
        made.make_hidden(tmp_path / name, numbers, head=head)
    parts = run_ranks(2, recorded_by_two, str(tmp_path))
    logits_TV = torch.cat([logits[:, :width] for logits, *_, width in parts], 1)
    want = []
    _, labels_BS = batch([0, 4, 1, 5])
    inside = {number: iter(made.make_row(number).hidden_TH.bfloat16()) for number in (0, 4, 1, 5)}
    for place in range(labels_BS.shape[1]):
        for row, number in enumerate((0, 4, 1, 5)):
            if labels_BS[row, place] != -100:
                z = next(inside[number]).float() @ heads[number // 4].float().T
                want.append(30 * torch.tanh(z / 30))
    want_TV = torch.stack(want)
    torch.testing.assert_close(logits_TV.float(), want_TV, rtol=2e-2, atol=2e-2)
    labels_T = labels_BS.T[labels_BS.T != -100]
    known_T = want_TV.log_softmax(1).gather(1, labels_T[:, None])[:, 0]
    for _, label_logprob_T, sizes, _ in parts:
        torch.testing.assert_close(label_logprob_T, known_T, rtol=2e-2, atol=5e-2)
        assert sum(sizes) == len(labels_T) and len(sizes) == 2
