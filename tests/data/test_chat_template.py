"""Conversations through chat templates: what the assistant writes is told from the rest, or the record is refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd.data.chat_template import BadRecord
from tests.data import hf_tokenizers
from tests.data.byte_tokenizer import BOS, END, EOS, START
from tests.data.encoding import NO, YES, encode, table

USER, ASSISTANT = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
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
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [hf_tokenizers.CHATML, hf_tokenizers.MARKED])
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
    template = "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}" + hf_tokenizers.MARKED
    assert encode({"messages": CONVERSATION}, letters, chat_template=template) == table(*CHATML)


@settings(max_examples=100, deadline=None)
@given(
    contents=st.lists(st.text(st.characters(exclude_categories=["Cs", "Cn"])), min_size=2, max_size=6),
    template=st.sampled_from([hf_tokenizers.CHATML, hf_tokenizers.MARKED, LLAMA_2.replace(" | trim", "")]),
)
def test_what_is_supervised_is_what_the_assistant_wrote(letters, contents, template):
    """For any contents: the supervised text holds the assistant's contents in order, and the rest holds none of it."""
    roles = ["user", "assistant"] * 3
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    ids, mask = encode({"messages": messages}, letters, chat_template=template, name="messages")
    ends = {END: "<|im_end|>", EOS: "<eos>", START: "<|im_start|>", BOS: "<bos>"}
    spell = lambda want: b"".join(  # noqa: E731
        letters.id_to_bytes(i) if i < 256 else ends[i].encode() for i, m in zip(ids, mask, strict=True) if m == want
    ).decode()
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    if template.startswith("{% for m in messages %}{% if"):
        assert spell(YES) == "".join(f" {answer} <eos>" for answer in answers)
    else:
        assert spell(YES) == "".join(f"{answer}<|im_end|>" for answer in answers)


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
