"""Every format, token by token: ids and masks written out by hand, and every complaint about a record.

A table is a list of (text or special id, supervised); with the byte tokenizer a text's ids are its bytes.
"""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd.data.chat_template import BadRecord, Segment
from megakd.data.formats import (
    SampleFormat,
    _pieces,
    build_formatter,
    check_format,
    detect_format,
    encode_segments,
    texts_of,
)
from megakd.data.nemo_chat import ChatTokens
from megakd.errors import DataError
from tests.data import hf_tokenizers
from tests.data.byte_tokenizer import BOS, END, EOS, START, byte_tokenizer

YES, NO = True, False


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    return byte_tokenizer(tmp_path_factory.mktemp("bytes"))


def encode(record, tokenizer, **choices):
    name = choices.pop("name", None) or detect_format(record, choices.get("columns", {}), "here")
    sample_format = SampleFormat(name, **choices)
    return encode_segments(build_formatter(sample_format, tokenizer)(record), tokenizer, sample_format)


def table(*rows):
    """(ids, mask) of a table."""
    flat = [(i, supervised) for what, supervised in rows for i in ([what] if isinstance(what, int) else what.encode())]
    return [i for i, _ in flat], [supervised for _, supervised in flat]


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


def turns(*values):
    return [{"from": name, "value": value, **({"label": more[0]} if more else {})} for name, value, *more in values]


USER_FIRST = turns(("User", "u1"), ("Assistant", "a1", "L1"), ("User", "u2"), ("Assistant", "a2", None))


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (  # the end of a turn and the start of the next are learnt after the assistant's turns only
            {"system": "S", "conversations": USER_FIRST, "mask": "User", "type": None},
            [("\0System\nS\n\x11User\nu1\n\x11Assistant\n", NO), ("a1\n\x11", YES), ("User\nu2\n\x11Assistant\n", NO),
             ("a2\n\x11", YES)],
        ),
        (
            {"system": "S", "conversations": USER_FIRST, "mask": "User", "type": "VALUE_TO_TEXT"},
            [("\0System\nS\n\x11User\nu1\n\x11Assistant\n\x12L1\n", NO), ("a1\n\x11", YES),
             ("User\nu2\n\x11Assistant\n", NO), ("a2\n\x11", YES)],
        ),
        (  # the label is learnt; a turn without one is learnt itself
            {"system": "S", "conversations": USER_FIRST, "mask": "User", "type": "TEXT_TO_VALUE"},
            [("\0System\nS\n\x11User\nu1\n\x11Assistant\na1\n\x12", NO), ("L1\n\x11", YES),
             ("User\nu2\n\x11Assistant\n", NO), ("a2\n\x11", YES)],
        ),
        (  # a first turn of the assistant is context; a last turn of the user is followed by nothing
            {"conversations": turns(("Assistant", "a0"), ("User", "u1"), ("Assistant", "a1"), ("User", "u2"))},
            [("\0System\n\n\x11Assistant\na0\n\x11User\nu1\n\x11Assistant\n", NO), ("a1\n\x11", YES),
             ("User\nu2\n", NO)],
        ),
        (  # with TEXT_TO_VALUE the first turn's label is learnt, and the start of a second turn of the masked role
            {"system": "", "conversations": turns(("Assistant", "a0", "L0"), ("User", "u1")), "type": "TEXT_TO_VALUE"},
            [("\0System\n\n\x11Assistant\na0\n\x12", NO), ("L0\n\x11", YES), ("User\nu1\n", NO)],
        ),
        (  # the other role masked; two turns of one role in a row
            {"system": "S", "mask": "Assistant",
             "conversations": turns(("Assistant", "a"), ("User", "u1"), ("User", "u2"), ("Assistant", "b"))},
            [("\0System\nS\n\x11Assistant\na\n\x11User\n", NO), ("u1\n", YES), ("\x11User\n", NO), ("u2\n\x11", YES),
             ("Assistant\nb\n", NO)],
        ),
    ],
)  # fmt: skip
def test_nemo_chat(letters, record, expected):
    assert encode(record, letters) == table(*expected)
    everything = "".join(text for text, _ in expected)
    assert encode(record, letters, answer_only_loss=False) == table((everything, YES))


def test_nemo_chat_with_other_tokens(letters):
    tokens = ChatTokens("<|im_start|>", "<|im_start|>", "<L>", "<|im_end|>\n", "\n")
    record = {"system": "S", "conversations": turns(("User", "u"), ("Assistant", "a"))}
    assert encode(record, letters, chat_tokens=tokens) == table(
        (START, NO), ("System\nS", NO), (END, NO), ("\n", NO), (START, NO), ("User\nu", NO), (END, NO), ("\n", NO),
        (START, NO), ("Assistant\n", NO), ("a", YES), (END, YES), ("\n", YES), (START, YES),
    )  # fmt: skip


CONVERSATION = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "u1"},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "u2"},
    {"role": "assistant", "content": " a2 \n"},
]
CHATML = [
    (START, NO), ("system\nS", NO), (END, NO), ("\n", NO), (START, NO), ("user\nu1", NO), (END, NO), ("\n", NO),
    (START, NO), ("assistant\n", NO), ("a1", YES), (END, YES), ("\n", NO), (START, NO), ("user\nu2", NO), (END, NO),
    ("\n", NO), (START, NO), ("assistant\n", NO), (" a2 \n", YES), (END, YES), ("\n", NO),
]  # fmt: skip
GENERATION = hf_tokenizers.CHATML.replace(
    "{{ m['content'] }}<|im_end|>\n",
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\\n' }}",
)
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [hf_tokenizers.CHATML, GENERATION])
def test_messages_with_chatml(letters, template):
    """By rendering prefixes or by the template's own marks: the same tokens are the assistant's."""
    record = {"messages": CONVERSATION}
    assert encode(record, letters, chat_template=template) == table(*CHATML)
    everything = [(what, YES) for what, _ in CHATML]
    assert encode(record, letters, chat_template=template, answer_only_loss=False) == table(*everything)


def test_messages_with_a_template_without_generation_prompt(letters):
    """Llama 2's: the answer with its eos is supervised, the space before it too."""
    record = {"messages": CONVERSATION[1:]}
    assert encode(record, letters, chat_template=LLAMA_2) == table(
        (BOS, NO), ("[INST] u1 [/INST]", NO), (" a1 ", YES), (EOS, YES),
        (BOS, NO), ("[INST] u2 [/INST]", NO), (" a2 ", YES), (EOS, YES),
    )  # fmt: skip


def test_messages_where_nothing_ends_a_turn(letters):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"  # noqa: E501
    record = {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}
    assert encode(record, letters, chat_template=template) == table(("user: u\nassistant: ", NO), ("a\n", YES))


def test_the_tokenizers_own_template_and_tools(letters, tmp_path):
    tokenizer = hf_tokenizers.byte_level(tmp_path)
    from megakd.data.tokenizers.load import load_tokenizer

    tokenizer = load_tokenizer(tokenizer)
    ids, mask = encode({"messages": CONVERSATION}, tokenizer)
    supervised = [i for i, learnt in zip(ids, mask, strict=True) if learnt]
    assert supervised == [*tokenizer.encode("a1"), 2, *tokenizer.encode(" a2 \n"), 2]
    record = {"messages": CONVERSATION[:3], "tools": [{"name": "é<"}]}
    template = (
        "{{ tools | tojson }}{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    assert encode(record, letters, chat_template=template)[0][:15] == list('[{"name": "é<"}]'.encode())[:15]


def test_lines_that_hold_only_a_tag_leave_nothing(letters):
    """Templates are written for Jinja with trim_blocks and lstrip_blocks, as transformers sets them."""
    template = "{% for m in messages %}\n  {% generation %}\n{{ m.content }}{% endgeneration %}\n{% endfor %}\n"
    assert encode({"messages": CONVERSATION[2:3]}, letters, chat_template=template) == table(("a1", YES))


def test_the_clock_is_out_of_reach(letters):
    template = "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}" + GENERATION
    assert encode({"messages": CONVERSATION}, letters, chat_template=template) == table(*CHATML)


def test_dummy_prefix_is_put_once(tmp_path, monkeypatch):
    """A tokenizer that writes a space before every text writes none between prompt and answer."""
    from megakd.data.tokenizers.load import load_tokenizer

    tokenizer = load_tokenizer(hf_tokenizers.metaspace(tmp_path))
    ids, mask = encode({"input": "hello", "output": "name"}, tokenizer)
    spelled = [tokenizer.id_to_bytes(i) for i in ids]
    answer = b"".join(piece for piece, learnt in zip(spelled, mask, strict=True) if learnt)
    assert b"".join(spelled) == b" hello name</s>" and answer == b" name</s>"
    monkeypatch.setattr("megakd.data.formats._pieces", lambda text, real=_pieces: real(text, 8))
    ids, _ = encode({"text": "hello to all of you"}, tokenizer)
    assert b"".join(map(tokenizer.id_to_bytes, ids)) == b" hello to all of you</s>"


@settings(max_examples=100, deadline=None)
@given(
    contents=st.lists(st.text(st.characters(exclude_categories=["Cs", "Cn"])), min_size=2, max_size=6),
    template=st.sampled_from([hf_tokenizers.CHATML, GENERATION, LLAMA_2.replace(" | trim", "")]),
)
def test_what_is_supervised_is_what_the_assistant_wrote(tmp_path_factory, contents, template):
    """For any contents: the supervised text holds the assistant's contents in order, and the rest holds none of it."""
    tokenizer = _letters(tmp_path_factory)
    roles = ["user", "assistant"] * 3
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    ids, mask = encode({"messages": messages}, tokenizer, chat_template=template, name="messages")
    ends = {END: "<|im_end|>", EOS: "<eos>", START: "<|im_start|>", BOS: "<bos>"}
    spell = lambda want: b"".join(  # noqa: E731
        tokenizer.id_to_bytes(i) if i < 256 else ends[i].encode() for i, m in zip(ids, mask, strict=True) if m == want
    ).decode()
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    if template.startswith("{% for m in messages %}{% if"):
        assert spell(YES) == "".join(f" {answer} <eos>" for answer in answers)
    else:
        assert spell(YES) == "".join(f"{answer}<|im_end|>" for answer in answers)


CACHE = []


def _letters(factory):
    if not CACHE:
        CACHE.append(byte_tokenizer(factory.mktemp("b")))
    return CACHE[0]


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
        encode(record, letters, name=name, chat_template=GENERATION)
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content }}", "refuses the conversation"),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "renders turn 2 differently"),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}",
            "renders turn 2 differently",
        ),
        ("{{ ''.__class__.__mro__ }}", "refuses the conversation"),
    ],
)
def test_templates_that_refuse_or_change_their_mind(letters, template, complaint):
    with pytest.raises(BadRecord, match=complaint):
        encode({"messages": [USER, ASSISTANT]}, letters, chat_template=template)


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
    monkeypatch.setattr("megakd.data.formats._pieces", lambda text, real=_pieces: real(text, 80))
    pieces = list(_pieces(text, 80))
    assert "".join(pieces) == text and max(map(len, pieces)) == 80 and len(pieces) > 6
    sample_format = SampleFormat("text", add_eos=False)
    ids, mask = encode_segments([Segment(text[:-94], True)], tokenizer, sample_format)
    assert ids == tokenizer.encode(text[:-94]) and mask == [True] * len(ids)


def test_unknown_keys_are_named_and_columns_help():
    with pytest.raises(DataError, match=r"f:1: the keys answer, question show none .*\nhint: rename keys"):
        detect_format({"question": "", "answer": ""}, {}, "f:1")
    assert detect_format({"question": ""}, {"input": "question", "output": "answer"}, "f:1") == "prompt_response"


def test_texts_for_a_tokenizer():
    assert texts_of({"messages": CONVERSATION[:2]}) == ["S", "u1"]
    assert texts_of({"system": "S", "conversations": USER_FIRST}) == ["S", "u1", "a1", "u2", "a2"]
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
