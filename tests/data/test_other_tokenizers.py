"""Hugging Face and tiktoken files behind the same interface: bytes of ids, special tokens, continued texts, damage."""

import base64
import itertools
import json
import re
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd.data.tokenizers.load import load_tokenizer
from megakd.errors import DataError
from tests.data import hf_tokenizers

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("hf")
    return {kind.__name__: kind(base / kind.__name__)
            for kind in (hf_tokenizers.byte_level, hf_tokenizers.metaspace, hf_tokenizers.word_piece)}  # fmt: skip


@pytest.fixture(scope="module")
def tiktoken_file(folders, tmp_path_factory):
    """The byte-level vocabulary again, as ranks: bytes first, then pieces in the order they were learnt."""
    tokenizer = load_tokenizer(folders["byte_level"])
    pieces = [tokenizer.id_to_bytes(i) for i in range(tokenizer.vocab_size) if not tokenizer.is_special(i)]
    path = tmp_path_factory.mktemp("tiktoken") / "toy.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(pieces)))
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    beside = {
        "pattern": pattern,
        "special_tokens": {"<|end|>": 319, "<|bos|>": 317},
        "eos": "<|end|>",
        "bos": "<|bos|>",
    }
    path.with_name("toy.tiktoken.json").write_text(json.dumps(beside))
    return path


@settings(max_examples=200, deadline=None)
@given(text=TEXT)
def test_byte_level_and_tiktoken_spell_every_text(folders, tiktoken_file, text):
    for path in (folders["byte_level"], tiktoken_file):
        tokenizer = _loaded(path)
        ids = tokenizer.encode(text)
        assert b"".join(map(tokenizer.id_to_bytes, ids)) == text.encode()
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text, continues=True) == ids


@settings(max_examples=200, deadline=None)
@given(first=TEXT, second=TEXT)
def test_metaspace_spells_a_text_and_its_continuation(folders, first, second):
    """Parts spell exactly the whole: the space before the text is there once, not before the second part."""
    tokenizer = _loaded(folders["metaspace"])
    if "\u2581" in first + second or not first:
        return
    ids = tokenizer.encode(first) + tokenizer.encode(second, continues=True)
    assert b"".join(map(tokenizer.id_to_bytes, ids)) == b" " + (first + second).encode()


CACHE = {}


def _loaded(path):
    if path not in CACHE:
        CACHE[path] = load_tokenizer(path)
    return CACHE[path]


def test_ids_and_settings_of_a_folder(folders):
    tokenizer = load_tokenizer(folders["byte_level"])
    assert (tokenizer.kind, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == ("huggingface", None, 2, 0)
    assert tokenizer.chat_template == hf_tokenizers.CHATML
    assert [path.name for path in tokenizer.files] == ["tokenizer.json", "tokenizer_config.json"]
    assert tokenizer.id_to_bytes(2) == b"<|im_end|>" and tokenizer.is_special(2)
    assert not tokenizer.is_special(3)
    assert sorted(tokenizer.id_to_bytes(i) for i in range(3, 259)) == sorted(bytes([value]) for value in range(256))


def test_special_tokens_are_made_only_when_asked_for(folders, tiktoken_file):
    tokenizer = load_tokenizer(folders["byte_level"])
    text = "<|im_start|>user\nhi<|im_end|>"
    plain = tokenizer.encode(text)
    assert not any(tokenizer.is_special(i) for i in plain)
    assert tokenizer.encode(text, special=True) == [1, *tokenizer.encode("user\nhi"), 2]
    assert tokenizer.encode(text) == plain
    tokenizer = load_tokenizer(tiktoken_file)
    assert tokenizer.encode("a<|end|>", special=True) == [*tokenizer.encode("a"), 319]
    assert not any(tokenizer.is_special(i) for i in tokenizer.encode("a<|end|>"))


def test_special_tokens_of_sentencepiece(tokenizer):
    assert tokenizer.encode("<s>hello</s></s>", special=True) == [1, *tokenizer.encode("hello"), 2, 2]
    assert tokenizer.encode("\u2581</s>", special=True) == [*tokenizer.encode("\u2581"), 2]


def test_metaspace_specials_and_continuation(folders):
    """`<s>` at the start of a continuing text is the token, and no space appears in the text after it."""
    tokenizer = load_tokenizer(folders["metaspace"])
    ids = tokenizer.encode("</s>", special=True, continues=True)
    assert ids == [2]
    assert tokenizer.encode("é", continues=True) != tokenizer.encode("é")
    assert tokenizer.id_to_bytes(3) == b"\x00" and not tokenizer.is_special(3)


def test_sentencepiece_with_a_dummy_prefix(tmp_path):
    """A model trained with SentencePiece's own defaults, as Llama 2's."""
    import sentencepiece

    (tmp_path / "text").write_text("\n".join(hf_tokenizers.TEXTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "t"), vocab_size=300, byte_fallback=True,
        minloglevel=2, remove_extra_whitespaces=False,
    )  # fmt: skip
    tokenizer = load_tokenizer(tmp_path / "t.model")
    spell = lambda ids: b"".join(map(tokenizer.id_to_bytes, ids))  # noqa: E731
    assert spell(tokenizer.encode("hello")) == b" hello"
    assert spell(tokenizer.encode("hello", continues=True)) == b"hello"
    assert spell(tokenizer.encode(" hello", continues=True)) == b" hello"
    assert tokenizer.encode(" hello", continues=True) == tokenizer.encode("hello")
    assert spell(tokenizer.encode("a</s>hello", special=True)) == b" a</s>hello"


def test_the_same_map_is_the_same_tokenizer_whatever_the_format(folders, tmp_path):
    """tiktoken and tokenizer.json of one map: equal fingerprints; one name changed: another."""
    source = load_tokenizer(folders["byte_level"])
    special = {source.id_to_bytes(i).decode(): i for i in range(source.vocab_size) if source.is_special(i)}
    rows = [(source.id_to_bytes(i), i) for i in range(source.vocab_size) if not source.is_special(i)]
    path = tmp_path / "x.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(piece) + b" %d\n" % i for piece, i in rows))
    for end, same in (("<|im_end|>", True), ("<|other|>", False)):
        names = {end if name == "<|im_end|>" else name: i for name, i in special.items()}
        path.with_name("x.tiktoken.json").write_text(json.dumps({"pattern": ".", "special_tokens": names}))
        assert (load_tokenizer(path).fingerprint == source.fingerprint) == same


def test_word_piece(folders):
    tokenizer = load_tokenizer(folders["word_piece"])
    ids = tokenizer.encode("Quickfox")
    assert b"".join(map(tokenizer.id_to_bytes, ids)) == b"quickfox" and len(ids) > 1
    assert tokenizer.is_special(tokenizer.eos_id) and tokenizer.is_special(0)


def test_chat_template_file_wins_over_nothing_and_named_templates(folders, tmp_path):
    shutil.copytree(folders["metaspace"], tmp_path / "a")
    assert load_tokenizer(tmp_path / "a").chat_template is None
    (tmp_path / "a" / "chat_template.jinja").write_text("from file")
    assert load_tokenizer(tmp_path / "a").chat_template == "from file"
    config = {"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path / "a").chat_template == "d"


def test_files_travel_alone(folders, tmp_path):
    """The files listed, copied into another folder, are the same tokenizer."""
    source = load_tokenizer(folders["byte_level"])
    for file in source.files:
        shutil.copy(file, tmp_path)
    copy = load_tokenizer(tmp_path / source.files[0].name)
    assert (copy.fingerprint, copy.eos_id, copy.chat_template) == (source.fingerprint, 2, source.chat_template)


def merge_by_rank(piece, ranks):
    """tiktoken's definition: join the leftmost neighbours whose union has the lowest rank, until none is a token."""
    parts = [bytes([value]) for value in piece]
    while True:
        unions = [(ranks[a + b], place) for place, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not unions:
            return [ranks[part] for part in parts]
        place = min(unions)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


@settings(max_examples=300, deadline=None)
@given(
    word=st.text("aber ", min_size=1, max_size=12),
    pieces=st.lists(st.text("aber", min_size=2, max_size=4), unique=True, max_size=40),
)
def test_tiktoken_merges_by_rank(tmp_path_factory, word, pieces):
    """Against the definition, on vocabularies where one word can be cut in many ways."""
    tokens = [bytes([value]) for value in range(256)] + [piece.encode() for piece in pieces]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    path = tmp_path_factory.mktemp("t") / "x.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    path.with_name("x.tiktoken.json").write_text(json.dumps({"pattern": "[a-z]+| "}))
    cut = re.findall("[a-z]+| ", word)
    expected = [
        i
        for part in cut
        for i in ([ranks[part.encode()]] if part.encode() in ranks else merge_by_rank(part.encode(), ranks))
    ]
    assert load_tokenizer(path).encode(word) == expected


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("tokenizer.json", b"{}", "is not a tokenizer.json"),
        ("tokenizer.json", b"\xff", "is not a tokenizer.json"),
        ("tokenizer_config.json", b"{", r"tokenizer_config\.json cannot be read"),
        ("tokenizer_config.json", b'{"eos_token": "<none>"}', "names '<none>' as eos_token"),
    ],
)
def test_damaged_folders_are_named(folders, tmp_path, name, content, complaint):
    shutil.copytree(folders["byte_level"], tmp_path / "a")
    (tmp_path / "a" / name).write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        load_tokenizer(tmp_path / "a")


def test_folders_and_files_without_a_tokenizer(tmp_path, tiktoken_file):
    with pytest.raises(DataError, match=r"holds neither tokenizer\.json nor"):
        load_tokenizer(tmp_path)
    shutil.copy(tiktoken_file, tmp_path)
    with pytest.raises(DataError, match=r"unknown pattern and special tokens\nhint: write toy\.tiktoken\.json"):
        load_tokenizer(tmp_path / "toy.tiktoken")
    shutil.copy(tiktoken_file, tmp_path / "r50k_base.tiktoken")
    assert load_tokenizer(tmp_path / "r50k_base.tiktoken").eos_id == 50256
    (tmp_path / "r50k_base.tiktoken").write_text("YQ== 0\nbroken\n")
    with pytest.raises(DataError, match="is not a tiktoken file"):
        load_tokenizer(tmp_path / "r50k_base.tiktoken")
