"""NeMo's chat records, token by token: ids and masks written out by hand."""

import pytest

from megakd.data.chat_template import BadRecord
from megakd.data.nemo_chat import ChatTokens
from tests.data.byte_tokenizer import END, START
from tests.data.encoding import NO, YES, encode, table, turns

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


def test_nemo_chat_with_several_masked_roles(letters):
    """As "mask": "User,Context" in NeMo: a turn of any of them is not learnt, its start after an answer is."""
    said = turns(("User", "u"), ("Context", "c"), ("Assistant", "a"), ("Context", "d"))
    record = {"mask": "User, Context", "conversations": said}
    assert encode(record, letters) == table(
        ("\0System\n\n\x11User\nu\n\x11Context\nc\n\x11Assistant\n", NO), ("a\n\x11", YES), ("Context\nd\n", NO)
    )
    with pytest.raises(BadRecord, match="the role to mask is 'Tool', the roles are Assistant, Context, User"):
        encode(record | {"mask": "User,Tool"}, letters)
