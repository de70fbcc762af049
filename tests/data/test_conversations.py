"""Conversations in every form are the same conversation; what a record says and nobody uses is named."""

import json

import pytest

from megakd.data.chat_template import BadRecord
from megakd.data.formats import SampleFormat, check_format, detect_format, texts_of
from megakd.errors import DataError
from tests.data import chat_templates, hf_tokenizers
from tests.data.byte_tokenizer import END, EOS, START
from tests.data.encoding import NO, YES, encode, encode_with_notes, table

MESSAGES = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "u1"},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "u2"},
    {"role": "assistant", "content": "a2"},
]
SHAREGPT = [
    {"from": "system", "value": "S"},
    {"from": "human", "value": "u1"},
    {"from": "gpt", "value": "a1"},
    {"from": "human", "value": "u2"},
    {"from": "gpt", "value": "a2"},
]
PARTS = [m | {"content": [{"type": "text", "text": m["content"][:1]}, {"type": "text", "text": m["content"][1:]}]}
         for m in MESSAGES]  # fmt: skip


def chatml(first=YES, last=YES):
    def turn(role, text, learnt):
        return [(START, NO), (f"{role}\n", NO), (text, learnt), (END, learnt), ("\n", NO)]

    return table(*turn("system", "S", NO), *turn("user", "u1", NO), *turn("assistant", "a1", first),
                 *turn("user", "u2", NO), *turn("assistant", "a2", last))  # fmt: skip


@pytest.mark.parametrize("template", [hf_tokenizers.CHATML, hf_tokenizers.MARKED])
@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": MESSAGES}, chatml()),
        ({"conversations": SHAREGPT}, chatml()),
        ({"conversations": SHAREGPT[1:], "system": "S", "id": 3}, chatml()),
        ({"conversations": MESSAGES}, chatml()),
        ({"messages": PARTS}, chatml()),
        ({"messages": [m | {"weight": m["content"] != "a1"} for m in MESSAGES]}, chatml(first=NO)),
        ({"messages": [m | {"weight": None} for m in MESSAGES], "tools": None, "system": None}, chatml()),
        ({"prompt": MESSAGES[:4], "completion": MESSAGES[4:]}, chatml(first=NO)),
        ({"prompt": MESSAGES[:2], "completion": MESSAGES[2:]}, chatml()),
    ],
)
def test_all_forms_are_one_conversation(letters, template, record, expected):
    assert detect_format(record, {}, "here") == "messages"
    ids, mask, notes = encode_with_notes(record, letters, chat_template=template)
    assert (ids, mask) == expected and notes == []


def test_a_template_that_takes_parts_gets_them(letters):
    template = "{% for m in messages %}{% for p in m.content %}[{{ p['text'] }}]{% endfor %}{% endfor %}"
    assert encode({"messages": PARTS[1:3]}, letters, chat_template=template)[0] == [*b"[u][1][a][1]"]
    joins = "{% for m in messages %}{% set text = m.content %}[{{ text }}]{% endfor %}"
    assert encode({"messages": PARTS[1:3]}, letters, chat_template=joins)[0] == [*b"[u1][a1]"]


@pytest.mark.parametrize(
    ("record", "choices", "expected"),
    [
        ({"instruction": "I", "input": "X", "output": "A"}, {}, [("I\n\nX", NO), (" A", YES), (EOS, YES)]),
        ({"instruction": "I", "input": "", "output": "A"}, {}, [("I", NO), (" A", YES), (EOS, YES)]),
        ({"instruction": "I", "output": "A"}, {}, [("I", NO), (" A", YES), (EOS, YES)]),
        ({"instruction": "I", "input": None, "output": "A"}, {"template": "{instruction}|{input}|{output}"},
         [("I||", NO), ("A", YES), (EOS, YES)]),
        ({"instruction": "I", "input": "X", "output": "A"}, {"template": "{instruction}|{input}|{output}"},
         [("I|X|", NO), ("A", YES), (EOS, YES)]),
        ({"ask": "I", "input": "X", "output": "A"}, {"columns": {"instruction": "ask"}},
         [("I\n\nX", NO), (" A", YES), (EOS, YES)]),
    ],
)  # fmt: skip
def test_alpaca(letters, record, choices, expected):
    assert detect_format(record, choices.get("columns", {}), "here") == "alpaca"
    ids, mask, notes = encode_with_notes(record, letters, **choices)
    assert (ids, mask) == table(*expected) and notes == []


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "I", "input": "X", "output": "A"},
        {"prompt": "I\n\nX", "completion": "A"},
        {"input": "I\n\nX", "output": "A"},
    ],
)
def test_pairs_through_a_chat_template(letters, record):
    assert encode(record, letters, name="messages", chat_template=hf_tokenizers.CHATML) == table(
        (START, NO), ("user\nI\n\nX", NO), (END, NO), ("\n", NO), (START, NO), ("assistant\n", NO), ("A", YES),
        (END, YES), ("\n", NO),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("record", "choices", "note"),
    [
        ({"input": "Q", "output": "A", "category": "c"}, {}, 'text under "category" is not used'),
        ({"instruction": "I", "input": "Q", "output": "A"}, {"name": "prompt_response"},
         'text under "instruction" is not used'),
        ({"instruction": "I", "input": "Q", "output": "A"}, {"columns": {"input": "instruction"}},
         'text under "input" is not used'),
        ({"text": "t", "title": "T"}, {}, 'text under "title" is not used'),
        ({"prompt": "P", "input": "Q", "output": "A"}, {}, 'text under "prompt" is not used'),
        ({"messages": MESSAGES, "source": "web"}, {}, 'text under "source" is not used'),
        ({"messages": [m | {"reasoning": "r"} for m in MESSAGES]}, {}, '"reasoning" of turns is not used'),
        ({"messages": MESSAGES, "tools": [{"name": "f"}]}, {}, '"tools" is not used'),
        ({"messages": MESSAGES, "chat_template_kwargs": {"x": 1}}, {}, '"x" of chat_template_kwargs is not used'),
        ({"messages": MESSAGES}, {"chat_template": chat_templates.CHATML.replace("m.content +", "m.content[:1] +")},
         "leaves out or changes what turns of the user say"),
    ],
)  # fmt: skip
def test_what_is_not_used_is_named_or_refused(letters, record, choices, note):
    choices = {"chat_template": chat_templates.CHATML, **choices}
    assert any(note in found for found in encode_with_notes(record, letters, **choices)[2])
    with pytest.raises(BadRecord, match=r"\(data\.strict\)") as refused:
        encode(record, letters, **choices, strict=True)
    assert note in str(refused.value)


def test_numbers_and_nothing_are_not_texts(letters):
    record = {"input": "Q", "output": "A", "id": 3, "label": None, "note": "  "}
    assert encode_with_notes(record, letters, strict=True)[2] == []


def test_a_mapped_column_that_is_not_there_is_named(letters):
    """And its unmapped name is not taken instead."""
    record = {"input": "Q", "output": "A"}
    with pytest.raises(BadRecord, match=r'no key "qestion", which data\.columns gives for input, \(found input, ou'):
        encode(record, letters, columns={"input": "qestion"})
    with pytest.raises(DataError, match=r"data\.columns names inptu, which prompt_response does not read"):
        check_format(SampleFormat("prompt_response", columns={"inptu": "question"}), letters)


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"messages": MESSAGES, "system": "S"}, 'there is a "system" text, and the first turn is'),
        ({"messages": MESSAGES, "system": ["S"]}, '"system" is a list'),
        ({"messages": MESSAGES, "tools": "[{"}, '"tools" is no JSON'),
        ({"messages": MESSAGES, "tools": {"a": 1}}, '"tools" is a dict'),
        ({"messages": MESSAGES, "chat_template_kwargs": 3}, '"chat_template_kwargs" is a int'),
        ({"messages": [m | {"weight": 0.5} for m in MESSAGES]}, "\"weight\" is 0.5, not 0 or 1"),
        ({"messages": [m | {"weight": 0} for m in MESSAGES]}, "nothing to learn from"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a part of its content is 'image'"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "a part of its content is 'str'"),
        ({"conversations": [{"from": "bard", "value": "x"}]}, "turn 1: unknown role 'bard'"),
        ({"prompt": MESSAGES[:2], "completion": "a"}, '"completion" is a str, not a list of turns'),
        ({"prompt": MESSAGES[:2], "completion": []}, "empty conversation"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("template", [hf_tokenizers.CHATML, hf_tokenizers.MARKED])
def test_conversations_that_cannot_be_used(letters, record, complaint, template):
    with pytest.raises(BadRecord) as caught:
        encode(record, letters, name="messages", chat_template=template)
    assert complaint in str(caught.value)


def test_nemo_chat_is_told_from_sharegpt():
    nemo = [{"from": "User", "value": "u"}, {"from": "Assistant", "value": "a"}]
    assert detect_format({"conversations": nemo}, {}, "f") == "nemo_chat"
    assert detect_format({"conversations": SHAREGPT, "mask": "human"}, {}, "f") == "nemo_chat"
    assert detect_format({"conversations": SHAREGPT}, {}, "f") == "messages"


def test_texts_for_a_tokenizer_of_every_form():
    said = ["S", "u1", "a1", "u2", "a2"]
    assert (
        texts_of({"conversations": SHAREGPT}) == said == texts_of({"prompt": MESSAGES[:2], "completion": MESSAGES[2:]})
    )
    assert "".join(texts_of({"messages": PARTS})) == "Su1a1u2a2"
    assert texts_of({"instruction": "i", "input": "x", "output": "o"}) == ["i", "x", "o"]


def test_what_is_given_is_in_the_key(letters):
    plain = SampleFormat("messages", chat_template="x").relevant(letters)
    more = SampleFormat("messages", chat_template="x", chat_template_kwargs={"thinking": False}).relevant(letters)
    assert plain != more and json.loads(json.dumps(more)) == more


@pytest.mark.parametrize("template", [hf_tokenizers.MARKED, chat_templates.ALWAYS_ASKS_AND_REFUSES])
def test_where_everything_is_learnt_nothing_has_to_be_told_apart(letters, template):
    """Answers or none, and templates whose turns cannot be found."""
    for messages in (MESSAGES[1:], MESSAGES[1:2]):
        ids, mask = encode({"messages": messages}, letters, chat_template=template, answer_only_loss=False)
        assert ids and all(mask)
