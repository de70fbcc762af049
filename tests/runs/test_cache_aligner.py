"""NeMo-Aligner's chunks in, trained on unchanged, and out again."""

import json
import pathlib

import numpy as np
import pytest

from megakd.cache import CacheReader, Contents, finish, read_header, writing
from megakd.cache.samples import read_sample
from megakd.cache.verify import verify
from megakd.data.dataset import TextDataset
from megakd.data.samples import SampleDataset
from megakd.data.token_files.layout import load_info
from megakd.errors import CacheError
from megakd.runs import cache_aligner
from megakd.runs.cache_tools import main
from megakd.targets import sample_key
from tests.cache import made
from tests.training import runs

K = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    runs.prepare(folder)
    return folder


def line(number: int, padded: int = 20, top_k: int = K) -> dict:
    """A padded sample as compute_topk_logits.py writes it, its logits those of a made-up teacher."""
    generator = np.random.default_rng(number)
    length = int(generator.integers(6, padded))
    tokens = np.append(generator.integers(3, runs.PIECES, length + 1), np.full(padded - length, 2))
    mask = np.zeros(padded, int)
    mask[generator.integers(1, length) : length] = 1
    logits = generator.normal(0, 2, (padded, runs.PIECES))
    logits -= logits.max(1, keepdims=True)
    ids = np.argsort(-logits, axis=1)[:, :top_k]
    return {
        "tokens": tokens[:-1].tolist(),
        "labels": tokens[1:].tolist(),
        "loss_mask": mask.tolist(),
        "topk_logits": np.take_along_axis(logits, ids, 1).tolist(),
        "topk_token_ids": ids.tolist(),
        "log_sum_exp_logits": np.log(np.exp(logits).sum(1)).tolist(),
        "index": number,
    }


def write_chunks(folder, lines, chunks=2) -> str:
    size = -(-len(lines) // chunks)
    for chunk in range(chunks):
        text = "".join(json.dumps(record) + "\n" for record in lines[chunk * size : (chunk + 1) * size])
        (folder / f"logits_{chunk}.jsonl").write_text(text)
    return str(folder / "logits_CHUNK_ID.jsonl")


def import_chunks(folder, tmp_path, template, *flags):
    flags = ["--input", template, "--tokenizer", f"{folder}/tokenizer.model", "--shard-samples", "4", *flags]
    return main(["import", *flags, "--output", str(tmp_path / "cache"), "--data", str(tmp_path / "data")])


def test_imported_samples_are_found_with_the_logits_they_came_with(folder, tmp_path, capsys):
    lines = [line(number) for number in range(10)]
    lines[3]["loss_mask"] = [0] * 20
    import_chunks(folder, tmp_path, write_chunks(tmp_path, lines), "--codec", "fp32")
    assert "1 lines without a supervised position left out, 0 tokens scaled" in capsys.readouterr().out
    header = verify(tmp_path / "cache")
    assert (header.rows, header.tail, header.mode, header.contents.top_k) == (9, "derived", "imported", K)
    data, reader = SampleDataset(tmp_path / "data", 64), CacheReader(tmp_path / "cache")
    kept = [record for number, record in enumerate(lines) if number != 3]
    assert len(data) == 9
    for index, record in enumerate(kept):
        sample = data.sample(0, index)
        mask = np.array(record["loss_mask"]) > 0
        assert (sample["labels"] >= 0).sum() == mask.sum()
        assert sample["labels"][sample["labels"] >= 0].tolist() == np.array(record["labels"])[mask].tolist()
        table = reader.table(*read_sample(sample["ids"], sample["labels"]))
        logits = np.array(record["topk_logits"])[mask]
        logprobs = logits - np.array(record["log_sum_exp_logits"])[mask][:, None]
        ids = np.array(record["topk_token_ids"])[mask]
        order = np.argsort(ids, axis=1)
        assert table.ids_TK.tolist() == np.take_along_axis(ids, order, 1).tolist()
        np.testing.assert_allclose(table.logprobs_TK, np.take_along_axis(logprobs, order, 1), atol=1e-6)
        np.testing.assert_allclose(table.log_tail_T, np.log1p(-np.exp(logprobs).sum(1)), atol=1e-5)
        assert table.top_id_T.tolist() == ids[:, 0].tolist()
        labels = np.array(record["labels"])[mask]
        known = (ids == labels[:, None]).any(1)
        assert (np.isnan(table.label_logprob_T) == ~known).all()


def test_an_interrupted_import_goes_on(folder, tmp_path):
    template = write_chunks(tmp_path, [line(number) for number in range(9)] + [line(9) | {"labels": [0] * 20}])
    with pytest.raises(CacheError, match=r"logits_1\.jsonl, line 5: label 0 of position \d+ is not the next token"):
        import_chunks(folder, tmp_path, template)
    assert not read_header(tmp_path / "cache").finished and not (tmp_path / "data.json").exists()
    assert len(list((tmp_path / "cache").glob("shard-*.arrow"))) == 2
    path = tmp_path / "logits_1.jsonl"
    text = path.read_text()
    path.write_text(text.replace("7", "8", 1))  # as long as before
    assert len(path.read_text()) == len(text)
    with pytest.raises(CacheError, match=r"holds another recording:\n  data\.imported: was"):
        import_chunks(folder, tmp_path, template)


def test_a_killed_import_goes_on_after_its_last_whole_shard(folder, tmp_path, monkeypatch):
    template = write_chunks(tmp_path, [line(number) for number in range(12)])
    import_chunks(folder, tmp_path / "whole", template)
    publish, left = cache_aligner.publish_part, iter(range(2))

    def publish_twice(*arguments):
        next(left)
        return publish(*arguments)

    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(cache_aligner, "publish_part", publish_twice)
        import_chunks(folder, tmp_path / "cut", template)
    assert len(list((tmp_path / "cut" / "cache").glob("shard-*.arrow"))) == 2
    import_chunks(folder, tmp_path / "cut", template)
    for path in (tmp_path / "whole").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "cut" / path.relative_to(tmp_path / "whole")).read_bytes(), path


def test_export_gives_back_what_was_imported(folder, tmp_path, capsys):
    lines = [line(number) for number in range(7)]
    import_chunks(folder, tmp_path, write_chunks(tmp_path, lines), "--codec", "fp32")
    (tmp_path / "out").mkdir()
    out = str(tmp_path / "out" / "logits_CHUNK_ID.jsonl")
    main(["export", str(tmp_path / "cache"), "--data", str(tmp_path / "data"), "--output", out, "--chunks", "2"])
    said = capsys.readouterr().out
    assert "7 of 7 samples: n_chunks=2 n_examples_per_chunk=3" in said and "_2.jsonl: the remaining 1, which" in said
    paths = [pathlib.Path(out.replace("CHUNK_ID", str(chunk))) for chunk in (0, 1, 2)]
    got = [json.loads(text) for path in paths for text in path.read_text().splitlines()]
    for record, want in zip(got, lines, strict=True):
        length = len(record["tokens"])
        mask = np.array(record["loss_mask"]) > 0
        assert record["loss_mask"] == want["loss_mask"][:length] and sum(want["loss_mask"][length:]) == 0
        assert record["tokens"] == want["tokens"][:length]
        assert np.array(record["labels"])[mask].tolist() == np.array(want["labels"][:length])[mask].tolist()
        for key in ("topk_logits", "topk_token_ids", "log_sum_exp_logits"):
            np.testing.assert_allclose(np.array(record[key])[mask], np.array(want[key][:length])[mask], atol=2e-6)
    import_chunks(folder, tmp_path / "again", out, "--codec", "fp32")
    a, b = (CacheReader(tmp_path / name / "cache").index for name in ("", "again"))
    assert a.high.read().tolist() == b.high.read().tolist() and len(a) == 7


@pytest.mark.parametrize(
    ("samples", "chunks", "sizes"), [(11, 4, [2, 2, 2, 2, 3]), (12, 4, [3] * 4), (7, 4, [1] * 4 + [3])]
)
def test_exported_chunks_are_of_one_size_and_nothing_is_lost(folder, tmp_path, capsys, samples, chunks, sizes):
    """NeMo-Aligner finds sample i in chunk i // n_examples_per_chunk."""
    import_chunks(folder, tmp_path, write_chunks(tmp_path, [line(number) for number in range(samples)]))
    flags = ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "out_CHUNK_ID.jsonl"), "--chunks"]
    main(["export", str(tmp_path / "cache"), *flags, str(chunks)])
    said = capsys.readouterr().out
    assert f"n_chunks={chunks} n_examples_per_chunk={sizes[0]}\n" in said
    assert (f"out_{chunks}.jsonl: the remaining {sizes[-1]}, " in said) == (len(sizes) > chunks)
    files = [(tmp_path / f"out_{chunk}.jsonl").read_text().splitlines() for chunk in range(len(sizes))]
    assert [len(texts) for texts in files] == sizes and len(list(tmp_path.glob("out_*"))) == len(sizes)
    ids = [sample_key(json.loads(text)["tokens"]) for texts in files for text in texts]
    assert ids == [sample_key(SampleDataset(tmp_path / "data", 64).sample(0, n)["ids"]) for n in range(samples)]
    with pytest.raises(CacheError, match=rf"--chunks {samples + 1}, but there are {samples} samples"):
        main(["export", str(tmp_path / "cache"), *flags, str(samples + 1)])


def test_export_finds_the_windows_of_running_text_that_training_and_validation_read(folder, tmp_path, capsys):
    data = TextDataset(folder / "train", 32, 7)
    stored = TextDataset(folder / "train", 32, None)
    samples = [data.sample(epoch, index) for epoch in (0, 1) for index in (0, 3, 5)] + [stored.sample(0, 2)]
    known = {read_sample(sample["ids"], sample["labels"]).key: sample for sample in samples}
    contents = Contents(vocab_size=runs.PIECES, top_k=K, temperatures=(1.0,), codec="fp32")
    changes = dict(
        data={"sequence_length": 32, "seed": 7}, tokenizer_fingerprint=load_info(folder / "train").tokenizer_fingerprint
    )
    with writing(tmp_path / "cache", made.make_header(contents, **changes)):
        rows = []
        for number, sample in enumerate(known.values()):
            _, mask_S, last_label = read_sample(sample["ids"], sample["labels"])
            rows.append(made.make_row(number, contents, (sample["ids"], mask_S, last_label)))
        made.write_part(tmp_path / "cache", 0, rows, contents)
        finish(tmp_path / "cache", made.make_header(contents, **changes))
    flags = ["--data", str(folder / "train"), "--output", str(tmp_path / "out_CHUNK_ID.jsonl")]
    main(["export", str(tmp_path / "cache"), *flags])
    assert f"{len(known)} of {len(known)} samples" in capsys.readouterr().out
    lines = [json.loads(text) for text in (tmp_path / "out_0.jsonl").read_text().splitlines()]
    assert {sample_key(record["tokens"]) for record in lines} == known.keys() and len(lines) == len(known)
    with pytest.raises(
        CacheError, match=r"holds none of the samples of .*read as sequences of 31 tokens\nhint: --data"
    ):
        main(["export", str(tmp_path / "cache"), *flags, "--sequence-length", "31"])


def test_rounded_logits_that_sum_to_more_than_one_are_scaled(folder, tmp_path, capsys):
    record = line(0)
    record["log_sum_exp_logits"] = [value - 0.01 for value in record["log_sum_exp_logits"]]
    record["topk_logits"] = [[0.0] + [-30.0] * (K - 1) for _ in range(20)]
    record["log_sum_exp_logits"] = [-0.01] * 20
    import_chunks(folder, tmp_path, write_chunks(tmp_path, [record], 1))
    assert f"{sum(record['loss_mask'])} tokens scaled down to 1" in capsys.readouterr().out
    verify(tmp_path / "cache")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"topk_token_ids": [[runs.PIECES + i for i in range(K)]] * 20}, r"go from 400 to 411, the vocabulary has 400"),
        ({"topk_token_ids": [[3] * K] * 20}, "the same id twice"),
        ({"log_sum_exp_logits": [float("nan")] * 20}, "a logit or log-sum-exp is nan"),
        ({"log_sum_exp_logits": [-3.0] * 20}, r"sum to \d+.*: topk_logits and log_sum_exp_logits do not belong"),
        ({"loss_mask": [1] * 19}, "its lists have different lengths"),
        ({"tokens": ["a"] * 20}, "ValueError"),
        ({"tokens": [10**30] * 20}, "token ids must be whole numbers|OverflowError|500 in a"),
        ({"labels": [4.5] * 20}, "token ids must be whole numbers"),
        ({"topk_token_ids": [[]] * 20, "topk_logits": [[]] * 20}, "its lists have different lengths"),
        ({"tokens": [500] * 20, "labels": [500] * 20}, "token 500 in a vocabulary of 400"),
    ],
)
def test_a_line_that_is_wrong_is_named(folder, tmp_path, change, words):
    with pytest.raises(CacheError, match=rf"logits_0\.jsonl, line 1: .*{words}"):
        import_chunks(folder, tmp_path, write_chunks(tmp_path, [line(0) | change], 1))


def test_a_line_with_another_number_of_entries_is_named(folder, tmp_path):
    fewer = line(1)
    for key in ("topk_logits", "topk_token_ids"):
        fewer[key] = [row[: K - 1] for row in fewer[key]]
    with pytest.raises(CacheError, match=r"line 2: it has 11 entries a token, the first sample 12\nhint: "):
        import_chunks(folder, tmp_path, write_chunks(tmp_path, [line(0), fewer], 1))


def test_a_line_of_other_bytes_and_a_gap_between_chunks_are_named(folder, tmp_path):
    template = write_chunks(tmp_path, [line(number) for number in range(3)], 3)
    (tmp_path / "logits_1.jsonl").write_bytes(b'{"tokens": "\xff\xfe"}\n')
    with pytest.raises(CacheError, match=r"logits_1\.jsonl, line 1: UnicodeDecodeError"):
        import_chunks(folder, tmp_path, template)
    (tmp_path / "logits_1.jsonl").unlink()
    with pytest.raises(CacheError, match=r"logits_1\.jsonl does not exist, but chunk 2 does\nhint: CHUNK_ID stands"):
        import_chunks(folder, tmp_path / "other", template)


def test_a_key_or_a_file_that_is_missing_is_named(folder, tmp_path):
    record = line(0)
    del record["topk_logits"]
    with pytest.raises(CacheError, match="line 1: it has no 'topk_logits'; expected tokens, labels"):
        import_chunks(folder, tmp_path, write_chunks(tmp_path, [record], 1))
    with pytest.raises(CacheError, match=r"none_0\.jsonl does not exist"):
        import_chunks(folder, tmp_path, str(tmp_path / "none_CHUNK_ID.jsonl"))


def test_training_reads_imported_data_unchanged(folder, tmp_path):
    from tests.ranks import run_ranks

    import_chunks(folder, tmp_path, write_chunks(tmp_path, [line(number) for number in range(12)]))
    config = runs.values(
        folder,
        tmp_path / "run",
        data__train=str(tmp_path / "data"),
        data__validation=None,
        teacher={"cache": str(tmp_path / "cache"), "allow_weak": True},
        loss={"top_k": K},
        train__steps=8,
        optimizer={"lr": 2e-2},
    )
    assert run_ranks(1, runs.train, config) == [None]
    lines = runs.lines(tmp_path / "run")
    assert len(lines) == 8 and lines[-1]["kd"] < lines[0]["kd"]
    assert "teacher_ce" not in lines[0], "the label's probability is not known where it is outside the K"
    assert "agreement" in lines[0]
