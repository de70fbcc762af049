"""What data.train names: indexes made once, found again, remade when what they depend on changes; blends, damage."""

import errno
import json
import logging
import multiprocessing
import os

import pytest

from megakd.config import Data
from megakd.data import sources
from megakd.data.blend import BlendedDataset
from megakd.data.dataset import TextDataset
from megakd.data.samples import PackedDataset, SampleDataset
from megakd.data.sources import find_index, open_data, parse_source
from megakd.data.token_files.reader import TokenFile
from megakd.data.tokenizers.load import load_tokenizer
from megakd.errors import ConfigError, DataError
from tests.data import hf_tokenizers
from tests.data.byte_tokenizer import EOS, byte_tokenizer


@pytest.fixture
def qa(tmp_path):
    path = tmp_path / "qa.jsonl"
    path.write_text("".join(json.dumps({"input": f"Q{n}", "output": "A" * n}) + "\n" for n in range(1, 9)))
    return path


def section(train, **more):
    return Data(train=str(train) if not isinstance(train, list) else train, sequence_length=20, **more)


def opened(train, tokenizer, seed=1, **more):
    data = section(train, **more)
    return open_data(data, data.train, tokenizer, seed, progress=False)


def test_raw_files_become_what_their_records_are(qa, letters, tmp_path):
    samples = opened(qa, letters)
    assert type(samples) is SampleDataset and len(samples) == 8
    row = samples.sample(0, 1)
    assert row["ids"].tolist() == [*b"Q2 AA"] and row["labels"].tolist() == [-100, *b" AA", EOS]
    assert type(opened(qa, letters, packing=True)) is PackedDataset
    assert type(opened(qa, letters, packing=True, seed=None)) is SampleDataset  # validation is never packed
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("hello " * 9)
    assert type(opened(tmp_path / "texts", letters)) is TextDataset
    assert (tmp_path / "texts.megakd").is_dir()


def test_an_index_is_made_once_and_again_when_anything_changes(qa, letters, monkeypatch, tmp_path):
    made = []
    real = sources.write_token_file
    monkeypatch.setattr(sources, "write_token_file", lambda *a, **k: made.append(a[1]) or real(*a, **k))
    monkeypatch.setattr(sources, "file_digest", lambda file, real=sources.file_digest: read.append(file) or real(file))
    read = []

    def find(**more):
        return find_index(section(qa, **more), qa, letters, progress=False)

    first = find()
    assert first.parent == qa.with_name("qa.jsonl.megakd") and len(made) == 1 and qa in read
    read.clear()
    assert find() == first and len(made) == 1 and qa not in read  # not even read again
    os.utime(qa, ns=(1, 1))
    assert find() == first and qa in read  # touched but the same
    for changes in ({"template": "{input}\n{output}"}, {"answer_only_loss": False}, {"add_bos": True},
                    {"on_error": "skip"}, {"columns": {"input": "output"}}):  # fmt: skip
        before = len(made)
        assert find(**changes) != first and len(made) == before + 1
    assert find(chat_template="{{ irrelevant }}", packing=True) == first
    qa.write_text(qa.read_text() + '{"input": "new", "output": "new"}\n')
    changed = find()
    assert changed != first
    other = byte_tokenizer(tmp_path)
    other.fingerprint = "ff" * 32
    assert find_index(section(qa), qa, other, progress=False) != changed
    assert find(index_dir=str(tmp_path / "elsewhere")).parent == tmp_path / "elsewhere"


def test_a_folder_of_records_with_their_descriptions_and_indexes(qa, letters, tmp_path):
    """What lies beside the records (READMEs, dataset_infos.json, an older index) is not data."""
    folder = tmp_path / "folder"
    folder.mkdir()
    qa.rename(folder / "qa.jsonl")
    (folder / "dataset_infos.json").write_text("{}")
    (folder / "README.md").write_text("about")
    assert len(opened(folder / "qa.jsonl", letters)) == 8
    assert len(opened(folder, letters)) == 8


def test_a_line_of_ten_megabytes(tmp_path, tokenizer):
    path = tmp_path / "long.jsonl"
    path.write_text("\n".join(json.dumps({"input": "Q", "output": "é" * n}) for n in (1, 5_000_000, 2)))
    data = opened(path, tokenizer)
    assert data.file.lengths.tolist() == [1 + 1 + 2 + 1, 1 + 1 + 10_000_000 + 1, 1 + 1 + 4 + 1]
    assert data.counts["truncated"] == 1 and data.length(0, 1) == 20


def test_the_chat_template_is_part_of_the_key(tmp_path, letters):
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}))
    (tmp_path / "t.jinja").write_text(hf_tokenizers.CHATML)
    by_file = find_index(section(path, chat_template=str(tmp_path / "t.jinja")), path, letters, progress=False)
    by_text = find_index(section(path, chat_template=hf_tokenizers.CHATML), path, letters, progress=False)
    other = find_index(section(path, chat_template="x" + hf_tokenizers.CHATML), path, letters, progress=False)
    assert by_file == by_text != other
    with pytest.raises(ConfigError, match=r"data\.chat_template: nowhere cannot be read"):
        find_index(section(path, chat_template="nowhere"), path, letters)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"eos_token": "<|endoftext|>", "chat_template": hf_tokenizers.CHATML}),
        ("tokenizer_config.json", {"eos_token": "<|im_end|>", "chat_template": hf_tokenizers.CHATML + " "}),
        ("tokenizer_config.json", {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}),
        ("special_tokens_map.json", {"pad_token": "<|im_end|>"}),
        ("chat_template.jinja", hf_tokenizers.MARKED),
    ],
)
def test_every_file_of_the_tokenizer_is_part_of_the_key(qa, tmp_path, file, content):
    """The map from ids to bytes is the same before and after."""
    folder = hf_tokenizers.byte_level(tmp_path / "t")
    before = load_tokenizer(folder)
    first = find_index(section(qa), qa, before, progress=False)
    (folder / file).write_text(content if isinstance(content, str) else json.dumps(content))
    after = load_tokenizer(folder)
    assert after.fingerprint == before.fingerprint
    second = find_index(section(qa), qa, after, progress=False)
    assert second != first and TokenFile(second).document(0)[-1] == after.eos_id
    assert find_index(section(qa), qa, load_tokenizer(folder), progress=False) == second


def test_a_token_file_whose_documents_end_with_another_eos_is_refused(qa, tmp_path):
    folder = hf_tokenizers.byte_level(tmp_path / "t")
    prefix = find_index(section(qa), qa, load_tokenizer(folder), progress=False)
    opened(prefix, load_tokenizer(folder))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    with pytest.raises(DataError, match=r"end with token 2, the eos of tokenizer .* is 0"):
        opened(prefix, load_tokenizer(folder))


def test_what_a_file_is_read_as_is_part_of_the_key(letters, tmp_path):
    content = json.dumps({"text": "a"})
    found = set()
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_text(content)
        data = section(tmp_path / name, index_dir=str(tmp_path / "index"), format="text")
        found.add(find_index(data, tmp_path / name, letters, progress=False))
    assert len(found) == 2


def test_unused_texts_are_named_once_and_refused_when_strict(qa, letters, caplog):
    qa.write_text("".join(json.dumps({"input": "Q", "output": "A", "why": "w"}) + "\n" for _ in range(1200)))
    with caplog.at_level(logging.WARNING, "megakd"):
        opened(qa, letters, columns={"completion": "nowhere"})
    assert [record.getMessage() for record in caplog.records] == [
        f'{qa}: no record has "nowhere", which data.columns gives for completion; text under "why" is not used '
        "(1,200); data.strict=true refuses such records"
    ]
    with pytest.raises(DataError, match=r'1200 records .*\n.*:1: text under "why" is not used \(data\.strict\)'):
        opened(qa, letters, strict=True)
    qa.write_text(json.dumps({"input": "Q", "output": "A"}))
    with pytest.raises(DataError, match=r'no record has "nowhere".*\(data\.strict\)'):
        opened(qa, letters, columns={"completion": "nowhere"}, strict=True)


def test_other_ranks_expect_the_index(qa, letters):
    data = section(qa)
    with pytest.raises(DataError, match="has no index for this run"):
        open_data(data, data.train, letters, 1, build=False)
    open_data(data, data.train, letters, 1, progress=False)
    assert len(open_data(data, data.train, letters, 1, build=False)) == 8


def test_a_folder_that_cannot_be_written_to_is_read_or_named(qa, letters, monkeypatch):
    """As a data disk mounted read-only: an index that is there serves, another cannot be made."""
    prefix = find_index(section(qa), qa, letters, progress=False)

    def refused(self, *arguments, **more):
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    real = type(qa).open
    monkeypatch.setattr(type(qa), "mkdir", refused)
    monkeypatch.setattr(type(qa), "write_text", refused)
    monkeypatch.setattr(
        type(qa), "open", lambda s, mode="r", *a, **k: (refused if "w" in mode else real)(s, mode, *a, **k)
    )
    assert find_index(section(qa), qa, letters, progress=False) == prefix
    with pytest.raises(DataError, match="Read-only file system"):
        find_index(section(qa, add_bos=True), qa, letters, progress=False)


def build_in_process(path, folder, results):
    results.put(str(find_index(section(path), path, byte_tokenizer(folder), progress=False)))


def test_processes_that_ask_at_once_make_one_index(qa, tmp_path):
    qa.write_text(qa.read_text() * 2000)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    folders = [tmp_path / str(n) for n in range(3)]
    for folder in folders:
        folder.mkdir()
    processes = [context.Process(target=build_in_process, args=(qa, folder, results)) for folder in folders]
    for process in processes:
        process.start()
    found = {results.get(timeout=120) for _ in processes}
    for process in processes:
        process.join()
    assert len(found) == 1 and len(list(qa.with_name("qa.jsonl.megakd").glob("*.bin"))) == 1


def test_a_failed_index_leaves_nothing_that_looks_like_one(qa, letters):
    qa.write_text('{"input": "a", "output": "b"}\n{"input": "a"}\n[]\n')
    with pytest.raises(DataError, match=r'2 records .*\n.*:2: no key "output".*\n.*:3: a list'):
        opened(qa, letters)
    folder = qa.with_name("qa.jsonl.megakd")
    assert {path.name for path in folder.iterdir()} <= {"lock", "digests.json"}
    assert opened(qa, letters, on_error="skip").counts == {"samples": 1, "truncated": 0, "dropped": 0, "skipped": 1 + 1}


def test_what_is_cut_or_left_out_is_said(qa, letters, caplog):
    data = Data(train=str(qa), sequence_length=5)
    with caplog.at_level(logging.WARNING, "megakd"):
        assert open_data(data, data.train, letters, 1, progress=False).counts["truncated"] == 6
    assert "of 8 samples 6 are cut to 6 tokens" in caplog.text


def test_blends_and_prefixes(qa, letters, tmp_path):
    prefix = find_index(section(qa), qa, letters, progress=False)
    blend = opened([0.75, str(qa), 0.25, str(prefix)], letters)
    assert type(blend) is BlendedDataset and len(blend) == 16
    parts = [blend.locate(0, index)[0] for index in range(16)]
    assert parts.count(0) == 12
    assert [opened([0.75, str(qa), 0.25, str(prefix)], letters, seed=None).locate(0, i)[0] for i in (0, 7, 8, 15)] == [
        0, 0, 1, 1,
    ]  # fmt: skip
    assert parse_source([0.7, "a", 3, "b"]) == (["a", "b"], [0.7, 3.0])
    assert parse_source(["a", "b"]) == (["a", "b"], None) and parse_source("a") == (["a"], None)


@pytest.mark.parametrize(
    ("train", "complaint"),
    [
        ("{tmp}/none", r"none does not exist, nor .*none\.idx"),
        ("{tmp}/empty", "no .* file in"),
        ("{tmp}/empty.jsonl", "holds no record"),
        ("{tmp}/odd.jsonl", r"odd\.jsonl:1: the keys a show none of the formats"),
        ("{tmp}/broken.jsonl", r"broken\.jsonl:1: broken JSON"),
    ],
)
def test_sources_that_cannot_be_opened(tmp_path, letters, train, complaint):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "odd.jsonl").write_text('{"a": 1}')
    (tmp_path / "broken.jsonl").write_text('{"a": \n')
    with pytest.raises(DataError, match=complaint):
        opened(train.replace("{tmp}", str(tmp_path)), letters)


def test_an_index_of_another_tokenizer_is_refused(qa, letters, tokenizer):
    prefix = find_index(section(qa), qa, letters, progress=False)
    with pytest.raises(DataError, match="was written with tokenizer"):
        opened(prefix, tokenizer)


def test_weights_of_tokens(tmp_path, letters):
    """Answers of 1 and of 9 letters: samples of 4 and of 12 ids, three of the short for one of the long."""
    for name, answer in (("short", "A"), ("long", "A" * 9)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"input": "Q", "output": answer}))
    train = [0.5, str(tmp_path / "short.jsonl"), 0.5, str(tmp_path / "long.jsonl")]
    blend = opened(train, letters, weights_of="tokens")
    assert [part.mean_length for part in blend.parts] == [3, 11]
    drawn = [blend.locate(epoch, index)[0] for epoch in range(7) for index in range(2)]
    assert (drawn.count(0), drawn.count(1)) == (11, 3)
    with pytest.raises(ValueError, match=r"weights_of: tokens, but data\.train = .*short\.jsonl has no weights"):
        opened(train[1], letters, weights_of="tokens")
    with pytest.raises(ValueError, match="weights_of: tokens"):
        opened(train[1::2], letters, weights_of="tokens")


def test_a_pattern_is_read_as_one(tmp_path, letters):
    (tmp_path / "data").mkdir()
    for name in ("b.jsonl", "a.jsonl", "c.csv"):
        (tmp_path / "data" / name).write_text(json.dumps({"input": "Q", "output": name[0]}))
    samples = opened(f"{tmp_path}/data/*.jsonl", letters)
    assert [samples.sample(0, index)["labels"][-2] for index in range(2)] == [*b"ab"]
    assert len(list((tmp_path / "data.megakd").glob("*.bin"))) == 1
    with pytest.raises(DataError, match="nothing matches"):
        opened(f"{tmp_path}/data/*.parquet", letters)


def test_keys_without_use_are_named(qa, letters, caplog):
    with caplog.at_level(logging.INFO, "megakd"):
        opened(qa, letters, chat_template="{{ messages }}", template="{input}{output}")
    assert f"{qa}: prompt_response has no use for data.chat_template" in caplog.text
    assert "data.template" not in caplog.text
