"""Tokenizers: exact round trips, identity, ids of special tokens, and what is said when one cannot be had."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd.data.tokenizers.load import load_tokenizer
from megakd.data.tokenizers.sentencepiece import train_sentencepiece
from megakd.data.tokenizers.tokenizer import fingerprint_of
from megakd.errors import DataError
from tests.data.conftest import CODE

AWKWARD = ["", " ", "   x", "\n\n\n", "a\tb\r\n", "\u2581", " \u2581\u2581 a", "a\x00b", "\ufeff",
           "<s></s><unk><0x41>", "é漢字🙂", "\u2585 \u2047"]  # fmt: skip


@pytest.mark.parametrize("text", [*AWKWARD, CODE])
def test_awkward_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(text=st.one_of(st.text(st.characters(exclude_categories=["Cs"])), st.text("ab \n\t\u2581<s>/0")))
def test_every_text_comes_back_and_nothing_special_is_made(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.id_to_bytes(i) for i in ids) == text.encode()
    assert not any(tokenizer.is_special(i) for i in ids)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_gives_the_exact_size_and_the_same_file_twice(tmp_path, kind):
    texts = [CODE, CODE.upper()] * 9
    first = train_sentencepiece(texts, tmp_path / "a.model", vocab_size=311, model_type=kind)
    second = train_sentencepiece(texts, tmp_path / "b.model", vocab_size=311, model_type=kind)
    assert first.vocab_size == 311
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    assert first.fingerprint == second.fingerprint == load_tokenizer(tmp_path / "a.model").fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.model", "b.model"]


def test_special_ids(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, None)
    assert [tokenizer.id_to_bytes(i) for i in range(5)] == [b"<unk>", b"<s>", b"</s>", b"\x00", b"\x01"]
    assert [tokenizer.is_special(i) for i in range(4)] == [True, True, True, False]
    assert tokenizer.encode("") == []


def test_whole_lines_with_their_ends_are_learnt(tmp_path):
    """Newlines reach the trainer: a document is not cut to lines stripped of their ends."""
    tokenizer = train_sentencepiece(["x:\n\n" * 500], tmp_path / "t.model", vocab_size=265)
    assert any(b"\n\n" in tokenizer.id_to_bytes(i) for i in range(tokenizer.vocab_size))


def test_long_texts_are_cut_not_dropped(tmp_path):
    """SentencePiece drops 'sentences' over a length; a document of one 3 MB line must still be learnt from."""
    tokenizer = train_sentencepiece(["abcd " * 600_000], tmp_path / "t.model", vocab_size=266)
    assert len(tokenizer.encode(" abcd abcd")) <= 6  # characters alone would be 10


def test_share_takes_blocks_from_the_whole_text(tmp_path):
    """With a quarter of the text, its last quarter still contributes its letters."""
    texts = ["ab " * 9000, "cd " * 9000, "ef " * 9000, "gh " * 9000]
    tokenizer = train_sentencepiece(texts, tmp_path / "t.model", vocab_size=272, share=0.25)
    assert all(tokenizer.encode(letter)[0] >= 259 for letter in "abcdefgh")  # a piece of its own, not a byte


def test_fingerprint_follows_bytes_and_kind():
    """Written out by hand: SHA-256 of b'S' + 1-byte length... of each id in order."""
    import hashlib

    record = b"S\x01\x00\x00\x00x" + b"T\x02\x00\x00\x00ab"
    assert fingerprint_of([(True, b"x"), (False, b"ab")]) == hashlib.sha256(record).hexdigest()
    assert fingerprint_of([(False, b"x"), (False, b"ab")]) != fingerprint_of([(True, b"x"), (False, b"ab")])
    assert fingerprint_of([(False, b"a"), (False, b"bc")]) != fingerprint_of([(False, b"ab"), (False, b"c")])


def test_another_vocabulary_is_another_identity(tokenizer, tmp_path):
    assert train_sentencepiece([CODE] * 20, tmp_path / "t.model", vocab_size=301).fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize(
    ("texts", "size", "expected"),
    [
        ([], 300, "no text"),
        ([""], 300, "no text"),
        (["abc def " * 9], 9999, "too large: these texts give at most 2"),
        (["abc def " * 9], 30, "too small: 256 bytes"),
    ],
)
def test_impossible_vocabularies_say_what_is_possible(tmp_path, texts, size, expected):
    with pytest.raises(DataError, match=expected):
        train_sentencepiece(texts, tmp_path / "t.model", vocab_size=size)
    assert not list(tmp_path.iterdir())


def test_the_size_named_in_the_hint_works(tmp_path):
    with pytest.raises(DataError) as caught:
        train_sentencepiece(["abc def " * 9], tmp_path / "t.model", vocab_size=9999)
    size = int(caught.value.hint.split()[1])
    assert train_sentencepiece(["abc def " * 9], tmp_path / "t.model", vocab_size=size).vocab_size == size


@pytest.mark.parametrize("content", [None, b"", b"not a model", "half"])
def test_a_missing_or_broken_model_is_named(tmp_path, tokenizer, content):
    path = tmp_path / "t.model"
    if content == "half":
        content = tokenizer.files[0].read_bytes()[:2000]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"t\.model.*(does not exist|not a SentencePiece model)"):
        load_tokenizer(path)
