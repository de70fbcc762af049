"""`megakd cache` and training from what it leaves, on real files, at several layouts."""

import json
import pathlib
import random
import re
import time

import numpy as np
import pytest

from megakd.cache import CacheReader, read_header
from megakd.cache.verify import verify
from megakd.runs.cache_tools import main
from tests.ranks import run_ranks
from tests.training import runs

SHARD_SAMPLES = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    runs.prepare(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(folder, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("teacher")
    config = runs.values(folder, run_dir, student__model__hidden_size=48, train__steps=25)
    assert run_ranks(2, runs.train, config) == [None, None]
    return run_dir


def distil(folder, teacher, run_dir, cache_dir, tp=1, **changes):
    defaults = {
        "loss": {"top_k": 50, "ce_weight": 0.2},
        "train__steps": 5,
        "cache": {"codec": "fp32", "shard_samples": SHARD_SAMPLES},
        "teacher": {"checkpoint": str(teacher), "cache": str(cache_dir) if cache_dir else None},
        "parallel__tp": tp,
    }
    return runs.values(folder, run_dir, **(defaults | changes))


class StopsAfter(runs.OneOfThePool):
    """Asked to stop after so many groups of samples."""

    def __init__(self, rank, groups):
        super().__init__(rank)
        self.groups = groups

    def agree_to_stop(self):
        self.groups -= 1
        return self.groups < 0


def record(rank, ranks, config, groups=10**9):
    """One rank of a recording; returns the text of an explained error."""
    from megakd.config import Config
    from megakd.errors import MegakdError
    from megakd.megatron_on_cpu import install

    install("cpu")
    from megakd.models.groups import destroy_groups
    from megakd.recording.record import record

    try:
        record(Config.from_dict(config), StopsAfter(rank, groups), "a test")
    except MegakdError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        destroy_groups()


@pytest.fixture(scope="module")
def cache(folder, teacher, tmp_path_factory):
    """Recorded on one rank: 8 samples of validation, 40 of training."""
    cache = tmp_path_factory.mktemp("cache")
    assert run_ranks(1, record, distil(folder, teacher, "unused", cache)) == [None]
    return cache


def tables(cache):
    """Every row of a cache by its key."""
    reader, rows = CacheReader(cache), {}
    for shard, shard_record in enumerate(reader.header.shards):
        for number in range(shard_record.rows):
            row = reader.row(shard, number)
            rows[row.key] = row
    return rows


def test_a_recording_is_whole_and_says_what_it_is(cache, teacher):
    header = verify(cache)
    assert (header.rows, header.parts, header.mode, header.contents.top_k) == (48, 7, "top_k", 50)
    assert header.tokens > 40 * 32 and header.data["validation_samples"] == 8
    assert header.created["command"] == "a test" and len(header.teacher_fingerprint) == 32
    assert not list(cache.glob("*.json*"))[1:] and not list(cache.glob("*.incomplete"))


@pytest.mark.parametrize(
    ("ranks", "tp", "changes"),
    [(2, 1, {}), (2, 2, {}), (4, 2, {"parallel__pp": 2}), (2, 1, {"parallel__fsdp": "teacher"})],
)
def test_every_layout_records_the_same(folder, teacher, cache, tmp_path, ranks, tp, changes):
    config = distil(folder, teacher, "unused", tmp_path, tp, **changes)
    assert run_ranks(ranks, record, config) == [None] * ranks
    want, got = tables(cache), tables(tmp_path)
    assert want.keys() == got.keys()
    for key in want:
        a, b = want[key], got[key]
        assert (a.counts_T == b.counts_T).all() and (a.mask_S == b.mask_S).all() and a.last_label == b.last_label
        assert (a.ids_N != b.ids_N).mean() < 0.01  # near-ties at the last place may fall either way
        same = a.ids_N == b.ids_N
        np.testing.assert_allclose(a.logprobs_N[same], b.logprobs_N[same], atol=2e-4)
        np.testing.assert_allclose(a.label_logprob_T, b.label_logprob_T, atol=2e-4)
    if "parallel__pp" not in changes and tp == 1:
        for path in sorted(cache.glob("shard-*")):
            assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_a_stopped_recording_goes_on(folder, teacher, cache, tmp_path):
    config = distil(folder, teacher, "unused", tmp_path)
    assert run_ranks(1, record, config, 9) == [None]
    assert not read_header(tmp_path).finished and len(list(tmp_path.glob("shard-*.arrow"))) == 2
    assert (tmp_path / "stopped.json").read_text() == '{"finished": false}\n'
    assert run_ranks(2, record, config) == [None, None]
    assert read_header(tmp_path).shards == read_header(cache).shards and not (tmp_path / "stopped.json").exists()
    before = (tmp_path / "cache.json").stat().st_mtime_ns
    assert run_ranks(1, record, config) == [None]
    assert (tmp_path / "cache.json").stat().st_mtime_ns == before
    (tmp_path / "index.bin").unlink()
    assert run_ranks(1, record, config) == [None]
    assert len(CacheReader(tmp_path)) == 48, "a lost index is made again"


@pytest.mark.parametrize(
    ("ranks", "tp", "changes"),
    [
        (1, 1, {}),
        (2, 2, {}),
        (2, 1, {"train__micro_batch_size": 4}),
        (2, 1, {"parallel__cp": 2}),
        (2, 1, {"parallel__pp": 2}),
        (1, 1, {"loss": {"top_k": 13, "ce_weight": 0.2}}),
        (1, 1, {"eval__samples": 5}),  # no multiple of the batch, which is filled up
        (2, 1, {"eval__samples": 3}),  # the second rank has nothing but that
    ],
)
def test_training_from_the_cache_is_training_online(folder, teacher, cache, tmp_path, ranks, tp, changes):
    same_training(folder, teacher, cache, tmp_path, ranks, tp, changes)


def test_every_recorded_temperature_trains_as_online_at_it_with_fewer_entries_too(folder, teacher, tmp_path):
    recorded = {"codec": "fp32", "temperatures": [1.5, 3.0]}
    config = distil(folder, teacher, "unused", tmp_path / "cache", cache=recorded)
    assert run_ranks(1, record, config) == [None]
    for temperature, top_k in ((1.5, 50), (3.0, 21)):
        changes = {"loss": {"top_k": top_k, "temperature": temperature}}
        run_dir = tmp_path / f"{temperature}"
        same_training(folder, teacher, tmp_path / "cache", run_dir, 1, 1, changes)


@pytest.mark.parametrize("ranges", [({"start": 0, "end": 19}, {"start": 19}), ({"share": "0/2"}, {"share": "1/2"})])
def test_ranges_recorded_by_two_jobs_and_merged_are_the_whole(folder, teacher, cache, tmp_path, ranges):
    for name, samples in zip("ab", ranges, strict=True):
        changes = {"cache": {"codec": "fp32", "shard_samples": SHARD_SAMPLES} | samples}
        assert run_ranks(1, record, distil(folder, teacher, "unused", tmp_path / name, **changes)) == [None]
    main(["merge", "--output", str(tmp_path / "ab"), str(tmp_path / "a"), str(tmp_path / "b")])
    want, got = tables(cache), tables(tmp_path / "ab")
    assert want.keys() == got.keys() and read_header(tmp_path / "ab").rows == 48
    for key in want:
        np.testing.assert_allclose(got[key].logprobs_N, want[key].logprobs_N, atol=1e-4)
    both = [str(tmp_path / "a"), str(tmp_path / "b")]
    for name, caches in (("run", str(tmp_path / "ab")), ("list", both)):
        config = distil(folder, teacher, tmp_path / name, None, train__steps=2, teacher__cache=caches)
        assert run_ranks(1, runs.train, config) == [None]
    assert runs.lines(tmp_path / "list") == runs.lines(tmp_path / "run")
    (message,) = run_ranks(1, record, config)
    assert "a teacher is recorded into one folder" in message
    (message,) = run_ranks(1, runs.train, config | {"teacher": config["teacher"] | {"cache": [*both, both[0]]}})
    assert "names one twice" in message


def same_training(folder, teacher, cache, tmp_path, ranks, tp, changes):
    """Runs online and from the cache, and compares every figure of every step."""
    online = distil(folder, teacher, tmp_path / "online", None, tp, **changes)
    cached = distil(folder, teacher, tmp_path / "cached", cache, tp, **changes)
    for config in (online, cached):
        assert run_ranks(ranks, runs.train, config) == [None] * ranks
    for kind in ("train", "validation"):
        a, b = runs.lines(tmp_path / "online", kind), runs.lines(tmp_path / "cached", kind)
        assert len(a) == {"train": 5, "validation": 1}[kind] and {"kd", "teacher_ce", "agreement"} <= a[-1].keys()
        runs.assert_close(b, a, rel=2e-5, abs=1e-6)


def test_samples_of_their_own_are_recorded_once_and_found_in_any_pack(folder, teacher, tmp_path):
    lines = [line for line in pathlib.Path(runs.__file__).read_text().splitlines() if len(line) > 30][:24]
    records = [{"input": line[:12], "output": line[12 : 20 + 3 * i]} for i, line in enumerate(lines)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    changes = {"data__train": str(tmp_path / "qa.jsonl"), "teacher__allow_weak": True, "data__workers": 1}
    config = distil(folder, teacher, tmp_path / "online", tmp_path / "cache", train__steps=12, **changes)
    assert run_ranks(1, record, config) == [None]
    assert read_header(tmp_path / "cache").rows == 24 + 8, "12 steps of 8 read the 24 samples four times"
    for packing in (False, True):
        config["data"]["packing"] = packing
        config["teacher"]["cache"] = None
        config["run"]["dir"] = str(tmp_path / f"online_{packing}")
        assert run_ranks(2, runs.train, config) == [None, None]
        config["teacher"]["cache"] = str(tmp_path / "cache")
        config["run"]["dir"] = str(tmp_path / f"cached_{packing}")
        assert run_ranks(2, runs.train, config) == [None, None]
        online, cached = (runs.lines(tmp_path / f"{kind}_{packing}") for kind in ("online", "cached"))
        runs.assert_close(cached, online, rel=2e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": {"top_k": 51}}, "holds 50 entries a token, this run wants 51"),
        ({"loss": {"top_k": 50, "temperature": 2.0}}, "recorded at temperature 1, this run wants 2"),
        ({"data__sequence_length": 16}, "recorded with sequences of 32 tokens, data.sequence_length is 16"),
        ({"run__seed": 7}, "does not hold the sample .* seed 1234 was recorded, this run has 7"),
        ({"train__steps": 7}, "does not hold the sample .* data, sequence length and seed are those of the recording"),
    ],
)
def test_a_run_that_the_cache_is_not_for_stops_with_the_reason(folder, teacher, cache, tmp_path, changes, words):
    config = distil(folder, teacher, tmp_path, cache, **changes)
    (failure,) = run_ranks(1, runs.train, config)
    assert failure.startswith("CacheError") and re.search(words, failure) and "\nhint: " in failure


def test_another_teacher_is_refused_by_name_and_none_is_needed(folder, teacher, cache, tmp_path):
    other = runs.values(folder, tmp_path / "other", train__steps=1)
    assert run_ranks(1, runs.train, other) == [None]
    config = distil(folder, tmp_path / "other", tmp_path / "a", cache)
    (failure,) = run_ranks(1, runs.train, config)
    assert re.search("was recorded from teacher .*, teacher.checkpoint is", failure)
    config["teacher"] = {"cache": str(cache)}
    assert run_ranks(1, runs.train, config) == [None]


def test_recording_needs_a_teacher_and_a_folder(folder, teacher, tmp_path):
    config = distil(folder, teacher, tmp_path, None)
    (failure,) = run_ranks(1, record, config)
    assert failure.startswith("ConfigError: teacher.checkpoint and teacher.cache are both needed")
    config = distil(folder, teacher, tmp_path, tmp_path / "cache", cache__start=1000)
    (failure,) = run_ranks(1, record, config)
    assert failure.startswith("ConfigError: cache.start = 1000, but there are 48 samples (8 of validation data)")


def record_a_broken_teacher(rank, ranks, config):
    """A recording whose teacher has a weight that is NaN."""
    from megakd.megatron_on_cpu import install

    install("cpu")
    import unittest.mock

    from megakd.assembly import models

    def load_and_break(gpt, *others):
        load(gpt, *others)
        next(gpt.parameters()).data[5] = float("nan")

    load = models.load_weights
    with unittest.mock.patch.object(models, "load_weights", load_and_break):
        return record(rank, ranks, config)


@pytest.mark.parametrize("recipe", [{"mode": "top_p", "top_p": 0.9}, {"mode": "sampled", "draws": 5}])
def test_a_teacher_that_says_nan_is_named_and_nothing_of_it_is_published(folder, teacher, tmp_path, recipe):
    config = distil(folder, teacher, "unused", tmp_path, 2, cache=recipe | {"shard_samples": 3})
    first, second = run_ranks(2, record_a_broken_teacher, config)
    assert first == second and re.search(r"CacheError: samples \d+ to \d+ of the recording: .*NaN", first), first
    assert "\nhint: look at the teacher's weights" in first
    parts = [pathlib.Path(path) for path in tmp_path.glob("shard-*.arrow")]
    assert all(path.with_suffix(".json").exists() for path in parts) and not read_header(tmp_path).finished


@pytest.mark.slow
def test_two_ranks_killed_again_and_again_end_with_the_rows_of_one_that_was_not(folder, teacher, tmp_path):
    """SIGKILL of the whole launch at random instants while shards are being written."""
    whole, cut, chance = tmp_path / "whole", tmp_path / "cut", random.Random(3)
    configs = [
        distil(folder, teacher, "unused", path, cache={"codec": "q8", "shard_samples": 1}) for path in (whole, cut)
    ]
    assert run_ranks(1, record, configs[0]) == [None]
    for _ in range(3):
        ranks, enough = runs.by_hand(tmp_path, 2, "cache", configs[1]), shards(cut) + chance.randint(1, 12)
        while shards(cut) < enough and all(rank.poll() is None for rank in ranks):
            time.sleep(0.001)
        time.sleep(chance.random() * 0.02)
        ended = [rank.communicate()[0] for rank in ranks if rank.poll() is not None]
        for rank in ranks:
            rank.kill()
        for rank in ranks:
            rank.wait()
        assert not ended, ended
        assert not read_header(cut).finished, "too fast to be killed: this test shows nothing"
    assert run_ranks(2, record, configs[1]) == [None, None]
    names = sorted(path.name for path in whole.iterdir())
    assert sorted(path.name for path in cut.iterdir()) == names
    for name in names:  # the header names the command that began it
        assert name == "cache.json" or (cut / name).read_bytes() == (whole / name).read_bytes(), name
    assert read_header(cut).shards == read_header(whole).shards
    assert len(CacheReader(cut)) == 48 and not CacheReader(cut).index.duplicates()


def shards(folder) -> int:
    return len(list(folder.glob("shard-*.arrow")))


@pytest.mark.parametrize("recipe", [{"mode": "sampled", "draws": 3000}, {"mode": "hybrid", "draws": 3000, "top_k": 20}])
def test_training_from_draws_approaches_the_full_divergence(folder, teacher, tmp_path, recipe):
    changes = {"train__steps": 3, "data__validation": None, "loss": {"top_k": runs.PIECES}}
    online = distil(folder, teacher, tmp_path / "online", None, **changes)
    assert run_ranks(1, runs.train, online) == [None]
    drawn = distil(folder, teacher, tmp_path / "drawn", tmp_path / "cache", 2, **changes, cache=recipe)
    assert run_ranks(2, record, drawn) == [None, None]
    assert run_ranks(2, runs.train, drawn) == [None, None]
    for a, b in zip(runs.lines(tmp_path / "online"), runs.lines(tmp_path / "drawn"), strict=True):
        assert b["kd"] == pytest.approx(a["kd"], rel=0.05)
        assert b["teacher_ce"] == pytest.approx(a["teacher_ce"], rel=1e-4)
        assert b["agreement"] == pytest.approx(a["agreement"], abs=0.02)
    drawn["loss"]["divergence"] = "reverse_kl"
    (failure, _) = run_ranks(2, runs.train, drawn | {"run": {"dir": str(tmp_path / "other"), "device": "cpu"}})
    assert failure.startswith("ConfigError: loss.divergence is reverse_kl, but")


def test_experts_divided_over_ranks_record_the_same(folder, tmp_path):
    """Ranks that share experts run them together, where one has no part left to record too."""
    moe = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 24}
    config = runs.values(folder, tmp_path / "teacher", student__model__moe=moe, train__steps=3)
    assert run_ranks(1, runs.train, config) == [None]
    for ranks, parallel in ((1, {}), (2, {"ep": 2}), (2, {"tp": 2, "ep": 2})):
        cache = tmp_path / f"cache {ranks} {parallel}"
        changes = {f"parallel__{axis}": size for axis, size in parallel.items()}
        assert (
            run_ranks(ranks, record, distil(folder, tmp_path / "teacher", "unused", cache, **changes)) == [None] * ranks
        )
    want, *others = [tables(cache) for cache in sorted(tmp_path.glob("cache *"))]
    for got in others:
        assert got.keys() == want.keys()
        for key, row in want.items():
            np.testing.assert_array_equal(got[key].ids_N, row.ids_N)
            np.testing.assert_allclose(got[key].logprobs_N, row.logprobs_N, atol=2e-5)
