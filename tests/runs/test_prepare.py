"""`megakd prepare` from files to token files, through its command line."""

import errno
import json
import os
import shutil

import pytest

from megakd.data import tokenization
from megakd.data.blocks import read_blocks
from megakd.data.token_files.reader import TokenFile
from megakd.data.tokenizers.load import load_tokenizer
from megakd.digests import sealed
from megakd.errors import DataError, MegakdError
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


def test_every_path_may_begin_with_the_home_folder(corpus, model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(corpus)
    made = ["--tokenizer", "~/made/t.model", "--output", "~/out/text"]
    assert main(["tokenizer", "--input", "~/corpus/*.py", "--output", "~/made/u.model", "--vocab-size", "290"]) == 0
    assert main(["text", "--input", "~/corpus/a.py", *made]) == 0
    assert main(["adopt", "~/out/text", "--tokenizer", "~/made/t.model"]) == 0
    looked = ["inspect", "~/corpus/c.jsonl", "--tokenizer", "~/made/t.model", "--sequence-length", "16"]
    assert main([*looked, "--png", "~/lengths.png"]) == 0
    assert (tmp_path / "lengths.png").exists() and (tmp_path / "made" / "u.model").exists()
    assert not list(corpus.glob("~*"))
    with pytest.raises(SystemExit):
        main(["text", "--input", "s3://bucket/x", *made])


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
    assert file.read_tokens(0, file.info.tokens).tolist() == tokenizer.encode("first") + tokenizer.encode("second\n")
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

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DataError, match="is full"):
        prepare(corpus, model, tmp_path / "x")
    assert not list(tmp_path.glob("x*"))


def test_the_summary_is_json_free_and_the_description_is_json(corpus, model, tmp_path):
    prepare(corpus, model, tmp_path / "a.b")  # a prefix with a dot keeps it
    assert json.loads((tmp_path / "a.b.json").read_text())["documents"] == 4


@pytest.fixture
def qa(tmp_path):
    path = tmp_path / "qa.jsonl"
    rows = [{"question": "what  is it?", "answer": "hello, world"}, {"question": "def a():", "answer": "\treturn  1"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


COLUMNS = ["--column", "input=question", "--column", "output=answer"]


def test_samples(qa, model, tmp_path, capsys):
    arguments = ["--input", str(qa), "--tokenizer", str(model), "--output", str(tmp_path / "x"), *COLUMNS]
    assert main(["samples", *arguments, "--template", "{input}\n{output}", "--no-eos", "--bos"]) == 0
    assert "prompt_response, 2 documents" in capsys.readouterr().out
    file, tokenizer = TokenFile(tmp_path / "x"), load_tokenizer(model)
    ids = file.document(1)
    assert ids[0] == tokenizer.bos_id and tokenizer.decode(ids) == "def a():\n\treturn  1"
    assert tokenizer.decode(ids[file.read_mask(int(file.starts[1]), len(ids))]) == "\treturn  1"
    main(["samples", *arguments, "--all-tokens"])
    file = TokenFile(tmp_path / "x")
    assert file.read_mask(0, file.info.tokens).all()
    with pytest.raises(DataError, match="expected NAME=KEY"):
        main(["samples", *arguments, "--column", "input"])


def test_a_tokenizer_learns_from_records_of_any_format(tmp_path):
    path = tmp_path / "chat.jsonl"
    record = {
        "messages": [{"role": "user", "content": "zebra " * 99}, {"role": "assistant", "content": "quagga " * 99}]
    }
    path.write_text(json.dumps(record))
    main(["tokenizer", "--input", str(path), "--output", str(tmp_path / "t.model"), "--vocab-size", "275"])
    tokenizer = load_tokenizer(tmp_path / "t.model")
    assert all(tokenizer.encode(letter)[0] >= 259 for letter in "zebrquag")


def test_adopt_describes_files_of_others(corpus, model, tmp_path, capsys):
    prefix = tmp_path / "x"
    prepare(corpus, model, prefix)
    ours = (tmp_path / "x.json").read_text()
    (tmp_path / "x.json").unlink()
    with pytest.raises(DataError, match=r"only \.bin and \.idx.*\nhint: .*prepare adopt PREFIX"):
        TokenFile(prefix)
    assert main(["adopt", str(prefix), "--tokenizer", str(model)]) == 0
    assert "4 documents" in capsys.readouterr().out
    assert sealed({**json.loads(ours), "made_from": None}) == json.loads((tmp_path / "x.json").read_text())
    content = bytearray((tmp_path / "x.bin").read_bytes())
    content[10:12] = (290).to_bytes(2, "little")
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"holds token 290 \(token number 5\), tokenizer .* has 290 ids"):
        main(["adopt", str(prefix), "--tokenizer", str(model)])


def test_inspect_shows_what_a_run_would_read(qa, model, tmp_path, capsys):
    flags = ["--tokenizer", str(model), "--sequence-length", "64", *COLUMNS, "--png", str(tmp_path / "l.png")]
    assert main(["inspect", str(qa), *flags, "--color", "never", "--samples", "1"]) == 0
    shown = capsys.readouterr().out
    assert "2 samples of at most 64 tokens" in shown and "what  is it?[[ hello, world</s>]]" in shown
    assert (tmp_path / "l.png").exists()
    assert main(["inspect", str(qa), *flags, "--packing", "--color", "always"]) == 0
    shown = capsys.readouterr().out
    assert "packs: 1" in shown and "--- packed with" in shown and "\x1b[32m hello, world</s>\x1b[0m" in shown


def test_adopt_keeps_masks(qa, model, tmp_path):
    """A masked file adopted as running text would have its prompts learnt too."""
    main(["samples", "--input", str(qa), "--tokenizer", str(model), "--output", str(tmp_path / "x"), *COLUMNS])
    before = (tmp_path / "x.json").read_bytes()
    for lost in (".mask", ".json"):
        (tmp_path / f"x{lost}").rename(tmp_path / f"kept{lost}")
        with pytest.raises(DataError, match="is a file of samples that megakd wrote"):
            main(["adopt", str(tmp_path / "x"), "--tokenizer", str(model)])
        (tmp_path / f"kept{lost}").rename(tmp_path / f"x{lost}")
    assert (tmp_path / "x.json").read_bytes() == before and ".mask" in TokenFile(tmp_path / "x").files


@pytest.mark.parametrize(
    ("verb", "flags", "complaint"),
    [
        ("text", ["--workers", "0"], "0 processes cannot tokenize anything"),
        ("samples", ["--workers", "0"], "workers: 0, expected integer >= 1"),
        ("samples", ["--template", ""], "template: '', expected non-empty text"),
        ("samples", ["--truncation", "left"], r"shortens to a length\nhint: add --sequence-length"),
        ("samples", ["--chat-argument", "x"], "--chat-argument x: expected NAME=VALUE"),
        ("inspect", ["--sequence-length", "0"], "sequence_length: 0, expected integer >= 1"),
        ("inspect", ["--png", "{tmp}/x.jsonl"], "Format 'jsonl' is not supported"),
        ("inspect", ["--png", "/proc/nowhere/x.png"], r"cannot write /proc/nowhere/x\.png"),
        ("text", ["--output", "/proc/nowhere/x"], "cannot write /proc/nowhere/x"),
        ("tokenizer", ["--output", "/proc/nowhere/x.model"], r"cannot write /proc/nowhere/x\.model"),
    ],
)
def test_flags_that_cannot_work_are_explained(qa, model, tmp_path, verb, flags, complaint):
    given = {
        "text": ["--input", str(qa), "--tokenizer", str(model), "--output", str(tmp_path / "x")],
        "samples": ["--input", str(qa), "--tokenizer", str(model), "--output", str(tmp_path / "x"), *COLUMNS],
        "inspect": [str(qa), "--tokenizer", str(model), "--sequence-length", "64", *COLUMNS],
        "tokenizer": ["--input", str(tmp_path / "corpus"), "--vocab-size", "290"],
    }[verb]
    with pytest.raises(MegakdError, match=complaint):
        main([verb, *given, *(flag.replace("{tmp}", str(tmp_path)) for flag in flags)])


def test_a_picture_in_a_new_folder_and_names_that_are_no_utf8(qa, model, tmp_path):
    flags = ["--tokenizer", str(model), "--sequence-length", "64", *COLUMNS]
    assert main(["inspect", str(qa), *flags, "--png", str(tmp_path / "new" / "deep" / "l.png")]) == 0
    assert (tmp_path / "new" / "deep" / "l.png").exists()
    records, text, output = (
        os.fsdecode(os.fsencode(tmp_path) + name) for name in (b"/\xe9.jsonl", b"/\xe9.txt", b"/\xe9")
    )
    shutil.copy(qa, records)
    shutil.copy(tmp_path / "corpus" / "a.py", text)
    with pytest.raises(DataError, match="is no UTF-8, and a config cannot hold it"):
        main(["inspect", records, *flags])
    with pytest.raises(DataError, match="is no UTF-8"):
        main(["samples", "--input", records, "--tokenizer", str(model), "--output", str(tmp_path / "x"), *COLUMNS])
    assert main(["text", "--input", text, "--tokenizer", str(model), "--output", output]) == 0
    assert len(TokenFile(output)) == 1


def test_what_is_not_used_is_said(qa, model, tmp_path, capsys):
    qa.write_text(json.dumps({"question": "a", "answer": "b", "why": "c"}))
    arguments = ["--input", str(qa), "--tokenizer", str(model), "--output", str(tmp_path / "x"), *COLUMNS]
    assert main(["samples", *arguments]) == 0
    assert 'not used: text under "why" is not used (1); --strict refuses such records' in capsys.readouterr().out
    with pytest.raises(DataError, match=r'text under "why" is not used \(data\.strict\)'):
        main(["samples", *arguments, "--strict"])


def test_a_chat_with_arguments_and_shortened_prompts(model, tmp_path):
    chat, pair = tmp_path / "chat.jsonl", tmp_path / "pair.jsonl"
    chat.write_text(json.dumps({"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}))
    (tmp_path / "t.jinja").write_text(
        "{{ note }}{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    flags = ["--tokenizer", str(model), "--output", str(tmp_path / "x")]
    template = ["--chat-template", str(tmp_path / "t.jinja"), "--chat-argument", "note=[1]"]
    main(["samples", "--input", str(chat), *flags, *template])
    assert load_tokenizer(model).decode(TokenFile(tmp_path / "x").document(0)) == "[1]ua"
    pair.write_text(json.dumps({"input": "hello, world " * 9, "output": "b"}))
    main(["samples", "--input", str(pair), *flags, "--truncation", "left", "--sequence-length", "11"])
    assert len(TokenFile(tmp_path / "x").document(0)) == 12
