"""Every format, token by token: ids and masks written out by hand, and every complaint about a record."""

import json

import pytest

from megakd.data.blocks import pieces
from megakd.data.chat_template import BadRecord, Segment
from megakd.data.formats import Sample, SampleFormat, check_format, detect_format, texts_of
from megakd.data.tokenization import encode_sample
from megakd.errors import DataError
from tests.data import hf_tokenizers
from tests.data.byte_tokenizer import BOS, END, EOS, START
from tests.data.encoding import NO, YES, encode, encode_with_notes, table, turns


@pytest.mark.parametrize(
    ("record", "choices", "expected"),
    [
        ({"text": "ab\n"}, {}, [("ab\n", YES), (EOS, YES)]),
        ({"text": "<|im_end|>"}, {"add_eos": NO, "add_bos": YES}, [(BOS, NO), ("<|im_end|>", YES)]),
        ({"input": "Q", "output": "A"}, {}, [("Q", NO), (" A", YES), (EOS, YES)]),
        ({"prompt": "Q", "completion": "A"}, {"add_bos": YES}, [(BOS, NO), ("Q", NO), (" A", YES), (EOS, YES)]),
        ({"input": "Q", "output": "A"}, {"answer_only_loss": NO}, [("Q A", YES), (EOS, YES)]),
        ({"input": "Q", "output": ""}, {"add_eos": NO}, [("Q", NO), (" ", YES)]),
        (
            {"input": "Q", "context": "C {input}", "output": " A "},
            {"template": "{context}|{input}\nA:  {output}"},
            [("C {input}|Q\nA:", NO), ("   A ", YES), (EOS, YES)],
        ),
        ({"input": "Q", "output": "A"}, {"template": "{input}\n{output}"}, [("Q\n", NO), ("A", YES), (EOS, YES)]),
        (
            {"question": "Q", "answer": "A", "output": "wrong"},
            {"columns": {"input": "question", "output": "answer"}},
            [("Q", NO), (" A", YES), (EOS, YES)],
        ),
        (
            {"input": "Q", "output": "A"},
            {"template": "<|im_start|>{input}<|im_end|>{output}"},
            [(START, NO), ("Q", NO), (END, NO), ("A", YES), (EOS, YES)],
        ),
    ],
)
def test_text_and_prompt_response(letters, record, choices, expected):
    assert encode(record, letters, **choices) == table(*expected)


def test_dummy_prefix_is_put_once(tmp_path, monkeypatch):
    """A tokenizer that writes a space before every text writes none between prompt and answer."""
    from megakd.data.tokenizers.load import load_tokenizer

    tokenizer = load_tokenizer(hf_tokenizers.metaspace(tmp_path))
    ids, mask = encode({"input": "hello", "output": "name"}, tokenizer)
    spelled = [tokenizer.id_to_bytes(i) for i in ids]
    answer = b"".join(piece for piece, learnt in zip(spelled, mask, strict=True) if learnt)
    assert b"".join(spelled) == b" hello name</s>" and answer == b" name</s>"
    monkeypatch.setattr("megakd.data.encoding.pieces", lambda text, real=pieces: real(text, 8))
    ids, _ = encode({"text": "hello to all of you"}, tokenizer)
    assert b"".join(map(tokenizer.id_to_bytes, ids)) == b" hello to all of you</s>"


USER, ASSISTANT = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("name", "record", "complaint"),
    [
        ("text", {"txt": "a"}, 'no key "text" (found txt)'),
        ("text", {}, 'no key "text" (found an empty object)'),
        ("text", {"text": None}, '"text" is a NoneType, not a string'),
        ("text", {"text": "a\ud83d"}, "'\\ud83d' is half of a surrogate pair"),
        ("prompt_response", {"input": "a"}, 'no key "output" (found input)'),
        ("prompt_response", {"prompt": "a", "completion": 3}, '"completion" is a int, not a string'),
        ("prompt_response", {"input": ["a"], "output": "b"}, '"input" is a list, not a string'),
        ("messages", {"messages": []}, "empty conversation"),
        ("messages", {"messages": "hi"}, '"messages" is a str, not a list'),
        ("messages", {"chat": []}, 'no key "messages" (found chat)'),
        ("messages", {"messages": [USER, {"role": "bot", "content": "x"}]}, "turn 2: unknown role 'bot'"),
        ("messages", {"messages": ["hi"]}, "turn 1: unknown role None"),
        ("messages", {"messages": [USER, {"role": "assistant"}]}, 'turn 2: "content" is a NoneType, not a string'),
        ("messages", {"messages": [USER]}, "nothing to learn from"),
        ("messages", {"messages": [USER, {"role": "assistant", "content": "\ufdd1"}]}, "U+FDD0"),
        ("nemo_chat", {"conversations": []}, "empty conversation"),
        ("nemo_chat", {"conversations": "x"}, '"conversations" is a str, not a list'),
        ("nemo_chat", {"conversations": turns(("User", "u")), "mask": "Human"}, "the role to mask is 'Human'"),
        ("nemo_chat", {"conversations": turns(("User", "u"))}, "nothing to learn from"),
        ("nemo_chat", {"conversations": turns(("User", "u")), "type": "X"}, "\"type\" is 'X', not one of None"),
        ("nemo_chat", {"conversations": [{"from": "User"}]}, 'turn 1: "value" is a NoneType'),
        ("nemo_chat", {"conversations": ["hi"]}, "turn 1: a str, not an object"),
        ("nemo_chat", {"conversations": turns(("User", "u", 3))}, 'turn 1: "label" is a int'),
        ("nemo_chat", {"conversations": turns(("User", "u")), "system": 3}, '"system" is a int'),
    ],
)
def test_a_record_that_cannot_be_used_says_why(letters, name, record, complaint):
    with pytest.raises(BadRecord) as caught:
        encode(record, letters, name=name, chat_template=hf_tokenizers.MARKED)
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("choices", "complaint"),
    [
        ({"name": "prompt_response", "template": "{input}"}, r"'\{input\}' does not end with \{output\}"),
        ({"name": "prompt_response", "template": "{output} {input}"}, r"does not end with \{output\}"),
        ({"name": "messages"}, "no chat template: data.chat_template is not given and tokenizer .* has none"),
        ({"name": "messages", "chat_template": "{% for %}"}, "cannot be parsed"),
    ],
)
def test_choices_that_cannot_work(letters, choices, complaint):
    with pytest.raises(DataError, match=complaint):
        check_format(SampleFormat(**choices), letters)


def test_missing_special_tokens_are_an_error(tmp_path):
    from megakd.data.tokenizers.load import load_tokenizer

    tokenizer = load_tokenizer(hf_tokenizers.byte_level(tmp_path))  # has no bos
    check_format(SampleFormat("text"), tokenizer)
    check_format(SampleFormat("messages", add_bos=True), tokenizer)
    with pytest.raises(DataError, match=r"has no bos, and data\.add_bos is true"):
        check_format(SampleFormat("text", add_bos=True), tokenizer)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": [], "text": ""}, "messages"),
        ({"conversations": []}, "nemo_chat"),
        ({"prompt": "", "completion": "", "id": 3}, "prompt_response"),
        ({"text": ""}, "text"),
    ],
)
def test_formats_are_told_by_their_keys(record, expected):
    assert detect_format(record, {}, "here") == expected


@pytest.mark.parametrize("kind", [hf_tokenizers.byte_level, None])
def test_long_texts_have_the_tokens_of_short_ones(tmp_path, tokenizer, monkeypatch, kind):
    """Cut every 80 characters or less, before spaces between words, the tokens are those of the whole text."""
    from megakd.data.tokenizers.load import load_tokenizer

    tokenizer = load_tokenizer(kind(tmp_path)) if kind else tokenizer
    text = ("def greet(name):\n    return  'hello, ' + name\n\n\n" * 9) + "x" * 90 + " end"
    monkeypatch.setattr("megakd.data.encoding.pieces", lambda text, real=pieces: real(text, 80))
    cut = list(pieces(text, 80))
    assert "".join(cut) == text and max(map(len, cut)) == 80 and len(cut) > 6
    sample_format = SampleFormat("text", add_eos=False)
    ids, mask, _ = encode_sample(Sample([Segment(text[:-94], True)], []), tokenizer, sample_format)
    assert ids.tolist() == tokenizer.encode(text[:-94]) and mask.all()


def test_unknown_keys_are_named_and_columns_help():
    with pytest.raises(DataError, match=r"f:1: the keys answer, question show none .*\nhint: rename keys"):
        detect_format({"question": "", "answer": ""}, {}, "f:1")
    assert detect_format({"question": ""}, {"input": "question", "output": "answer"}, "f:1") == "prompt_response"


def test_texts_for_a_tokenizer():
    conversation = [{"role": "system", "content": "S"}, {"role": "user", "content": "u1"}]
    assert texts_of({"messages": conversation}) == ["S", "u1"]
    conversation = turns(("User", "u1"), ("Assistant", "a1", "L1"))
    assert texts_of({"system": "S", "conversations": conversation}) == [
        "S",
        "u1",
        "a1",
    ]
    assert texts_of({"input": "i", "output": "o", "n": 3}) == ["i", "o"]
    assert texts_of({"text": 3}) == []


def test_what_tokens_depend_on_is_json(letters):
    for name in ("text", "prompt_response", "nemo_chat", "messages"):
        relevant = SampleFormat(name, chat_template="x").relevant(letters)
        assert json.loads(json.dumps(relevant)) == relevant
    assert SampleFormat("text").relevant(letters) == SampleFormat("text", template="other").relevant(letters)
    assert (
        SampleFormat("prompt_response").relevant(letters)
        != SampleFormat("prompt_response", template="x{output}").relevant(letters)
    )  # fmt: skip


QUESTION = {"context": "0123456789", "input": "abcdefgh", "output": "XY"}


@pytest.mark.parametrize(
    ("choices", "most", "expected"),
    [
        ({"truncation": "left"}, 18, [("0123456789|fgh:", NO), ("XY", YES), (EOS, YES)]),
        ({"truncation": "right"}, 18, [("0123456789|abc:", NO), ("XY", YES), (EOS, YES)]),
        ({"truncation": "right", "truncation_field": "context"}, 18,
         [("01234|abcdefgh:", NO), ("XY", YES), (EOS, YES)]),
        ({"truncation": "left", "add_bos": True}, 22, [(BOS, NO), ("0123456789|cdefgh:", NO), ("XY", YES), (EOS, YES)]),
        ({"truncation": "left"}, 5, [("0123456789|:", NO), ("XY", YES), (EOS, YES)]),
        ({"truncation": "left"}, 23, [("0123456789|abcdefgh:", NO), ("XY", YES), (EOS, YES)]),
        ({"truncation": "end"}, None, [("0123456789|abcdefgh:", NO), ("XY", YES), (EOS, YES)]),
    ],
)  # fmt: skip
def test_prompts_are_shortened_as_far_as_it_helps(letters, choices, most, expected):
    """The template's own text and the answer stay whole; what is still too long is cut at its end when it is read."""
    ids, mask, notes = encode_with_notes(
        QUESTION, letters, name="prompt_response", template="{context}|{input}:{output}", most_tokens=most, **choices
    )
    whole = len("0123456789|abcdefgh:XY") + 1 + choices.get("add_bos", False)
    assert (ids, mask) == (table(*expected)) and bool(notes) == (len(ids) < whole)


def test_shortened_prompts_of_a_tokenizer_with_longer_tokens(tokenizer):
    """Whole tokens are left out, and what is left is what the tokens of the whole text were."""
    choices = {"template": "Q: {input}\nA: {output}", "truncation": "left"}
    record = {"input": "def greet(name): print name, " * 9, "output": "hello"}
    whole, mask, _ = encode_with_notes(record, tokenizer, **choices)
    ids, shorter, _ = encode_with_notes(record, tokenizer, **choices, most_tokens=len(whole) - 40)
    assert len(ids) == len(whole) - 40 and sum(shorter) == sum(mask)
    text = tokenizer.decode(ids)
    assert text.startswith("Q: ") and text.endswith(" print name, \nA: hello") and ids[-60:] == whole[-60:]


def test_truncation_of_what_has_no_such_prompt(letters):
    with pytest.raises(DataError, match=r"truncation_field is context, which is not in the prompt .*\n.* of input"):
        check_format(SampleFormat("prompt_response", truncation="left", truncation_field="context"), letters)
    with pytest.raises(DataError, match="samples of text are cut at their end"):
        check_format(SampleFormat("text", truncation="left"), letters)
