"""`megakd prepare` from files to token files, through its command line."""

import errno
import json

import pytest

from megakd.data import tokenization
from megakd.data.indexed import TokenFile
from megakd.data.records import read_blocks
from megakd.data.tokenizers import load_tokenizer
from megakd.errors import DataError
from megakd.runs.prepare import main


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.py").write_text("def a():\n\treturn  1\n" * 30)
    (folder / "deep" / "b.txt").write_text("hello, world\n\n" * 20)
    (folder / "deep" / "empty.txt").write_text("")
    (folder / "c.jsonl").write_text('{"text": "first"}\n{"text": "second\\n"}\n')
    return folder


@pytest.fixture
def model(corpus, tmp_path):
    path = tmp_path / "made" / "t.model"
    assert main(["tokenizer", "--input", str(corpus), "--output", str(path), "--vocab-size", "290"]) == 0
    return path


def prepare(corpus, model, output, *flags):
    return main(["text", "--input", str(corpus), "--tokenizer", str(model), "--output", str(output), *flags])


def test_text_to_tokens_and_back(corpus, model, tmp_path, capsys):
    assert prepare(corpus, model, tmp_path / "out" / "train") == 0
    summary = capsys.readouterr().out
    tokenizer = load_tokenizer(model)
    file = TokenFile(tmp_path / "out" / "train", tokenizer.fingerprint)
    documents = [file.document(number).tolist() for number in range(len(file))]
    assert [ids[-1] for ids in documents] == [tokenizer.eos_id] * 4
    assert [tokenizer.decode(ids[:-1]) for ids in documents] == [
        (corpus / "a.py").read_text(), "first", "second\n", (corpus / "deep" / "b.txt").read_text(),
    ]  # fmt: skip
    assert "left out 1 empty documents" in summary and f"4 documents, {file.info.tokens:,} tokens" in summary
    assert file.info.eos_appended and file.info.vocab_size == 290


def test_no_eos(corpus, model, tmp_path):
    prepare(corpus, model, tmp_path / "x", "--no-eos", "--suffix", ".jsonl")
    file, tokenizer = TokenFile(tmp_path / "x"), load_tokenizer(model)
    assert [tokenizer.decode(file.document(n)) for n in range(2)] == ["first", "second\n"]
    assert file.tokens.tolist() == tokenizer.encode("first") + tokenizer.encode("second\n")
    assert not file.info.eos_appended


def test_blocks_and_workers_do_not_change_the_result(corpus, model, tmp_path, monkeypatch):
    prepare(corpus, model, tmp_path / "a")
    monkeypatch.setattr(tokenization, "read_blocks", lambda files: read_blocks(files, 7))
    prepare(corpus, model, tmp_path / "b")
    monkeypatch.setattr(tokenization, "_POOL_BYTES", 0)
    prepare(corpus, model, tmp_path / "c", "--workers", "2")
    for suffix in (".bin", ".idx", ".json"):
        first = (tmp_path / f"a{suffix}").read_bytes()
        assert (tmp_path / f"b{suffix}").read_bytes() == first == (tmp_path / f"c{suffix}").read_bytes()


def test_bad_records_stop_the_run_or_are_left_out_and_counted(corpus, model, tmp_path, capsys):
    (corpus / "bad.jsonl").write_text('{"text": 1}\n{"text": "good"}\n{"tex": ""}\n')
    with pytest.raises(DataError, match=r"2 records .*(\n.*)*bad\.jsonl:1: .*\n.*bad\.jsonl:3: "):
        prepare(corpus, model, tmp_path / "x")
    with pytest.raises(DataError, match="2 records"):
        main(["tokenizer", "--input", str(corpus), "--output", str(tmp_path / "t.model"), "--vocab-size", "290"])
    assert not list(tmp_path.glob("x*")) and not (tmp_path / "t.model").exists()
    assert prepare(corpus, model, tmp_path / "x", "--on-error", "skip") == 0
    assert "left out 2 records" in capsys.readouterr().out
    assert len(TokenFile(tmp_path / "x")) == 5


def test_max_bytes_limits_what_the_tokenizer_learns_from(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("abc " * 5000)
    (folder / "b.txt").write_text("xyz " * 5000)
    main(["tokenizer", "--input", str(folder), "--output", str(tmp_path / "t.model"), "--vocab-size", "268",
          "--max-bytes", "20000"])  # fmt: skip
    assert "on 50.0 % of the text" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--input", "{tmp}/none"], "none does not exist"),
        (["--input", "{tmp}/corpus", "--suffix", ".c"], r"no \.c file"),
        (["--tokenizer", "{tmp}/none.model"], r"none\.model does not exist"),
        (["--input", "{tmp}/corpus/deep/empty.txt"], "no document"),
        (["--output", "{tmp}/corpus/a.py/x"], "cannot write"),
    ],
)
def test_mistakes_are_explained(corpus, model, tmp_path, arguments, complaint):
    flags = {"--input": str(corpus), "--tokenizer": str(model), "--output": str(tmp_path / "x")}
    flags |= {name: value.replace("{tmp}", str(tmp_path)) for name, value in zip(*[iter(arguments)] * 2, strict=True)}
    with pytest.raises(DataError, match=complaint):
        main(["text", *(word for pair in flags.items() for word in pair)])
    assert not list(tmp_path.glob("x*"))


def test_a_full_disk_leaves_nothing(corpus, model, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("megakd.data.indexed.os.fsync", full)
    with pytest.raises(DataError, match="is full"):
        prepare(corpus, model, tmp_path / "x")
    assert not list(tmp_path.glob("x*"))


def test_the_summary_is_json_free_and_the_description_is_json(corpus, model, tmp_path):
    prepare(corpus, model, tmp_path / "a.b")  # a prefix with a dot keeps it
    assert json.loads((tmp_path / "a.b.json").read_text())["documents"] == 4
