"""NeMo's chat records: the text around the turns, and which of it NeMo's chat fine-tuning supervises.

    <system_turn_start>System<end_of_name>SYSTEM<end_of_turn>
    <turn_start>User<end_of_name>VALUE<end_of_turn>
    <turn_start>Assistant<end_of_name>[<label_start>LABEL<end_of_name>]VALUE<end_of_turn>      VALUE_TO_TEXT
    <turn_start>Assistant<end_of_name>VALUE<end_of_turn>[<label_start>LABEL<end_of_name>]      TEXT_TO_VALUE
    <turn_start>                                       after a last turn that is not of the masked role

Without a type, labels are left out. Supervised is, in every turn of a role other than `mask` (one, or several as in
"User,Context"), the value with its end of
turn (TEXT_TO_VALUE: the label with its end of name, if there is one), and the start of a masked turn after it, which
tells the model to stop. The first turn is context and never supervised, but for TEXT_TO_VALUE.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megakd.data.chat_template import BadRecord, Segment

TYPES = (None, "TEXT_TO_VALUE", "VALUE_TO_TEXT")


@dataclass(frozen=True)
class ChatTokens:
    """The strings around NeMo's turns (data.chat_prompt_tokens there); the defaults are NeMo's."""

    system_turn_start: str = "\x00"
    turn_start: str = "\x11"
    label_start: str = "\x12"
    end_of_turn: str = "\n"
    end_of_name: str = "\n"


def nemo_chat_segments(record: Mapping, tokens: ChatTokens) -> list[Segment]:
    """One conversation.

    Raises:
        BadRecord: a key is missing or of the wrong type, there is no turn, no turn is of the masked role.
    """
    turns, masked, kind = _checked(record)
    header = f"{tokens.system_turn_start}System{tokens.end_of_name}{record.get('system') or ''}{tokens.end_of_turn}"
    parts = [Segment(header, False)]
    for number, turn in enumerate(turns):
        parts += _turn(number, turn, turn["from"] in masked, kind, tokens)
    if turns[-1]["from"] not in masked:
        parts.append(Segment(tokens.turn_start, True))
    merged: list[Segment] = []
    for part in parts:
        if merged and merged[-1].supervised == part.supervised:
            part = Segment(merged.pop().text + part.text, part.supervised)
        merged.append(part)
    return [segment for segment in merged if segment.text]


def _turn(number: int, turn: dict, masked: bool, kind: str | None, tokens: ChatTokens) -> Iterator[Segment]:
    """The parts of one turn, whose `number` counts from 0."""
    label = turn.get("label") if kind else None
    label_text = "" if label is None else f"{label}{tokens.end_of_name}"
    name, value = f"{turn['from']}{tokens.end_of_name}", f"{turn['value']}{tokens.end_of_turn}"
    is_context = number == 0 and kind != "TEXT_TO_VALUE"
    ends_turn_before = masked and number >= (1 if kind == "TEXT_TO_VALUE" else 2)
    yield Segment(tokens.turn_start, ends_turn_before)
    yield Segment(name, False)
    supervised = not masked and not is_context
    if kind == "VALUE_TO_TEXT":
        yield Segment(tokens.label_start + label_text if label_text else "", False)
        yield Segment(value, supervised)
    elif label_text:
        yield Segment(value + tokens.label_start, False)
        yield Segment(label_text, supervised)
    else:
        yield Segment(value, supervised)


def _checked(record: Mapping) -> tuple[list[dict], set[str], str | None]:
    turns, mask, kind = record.get("conversations"), record.get("mask", "User"), record.get("type")
    if turns == []:
        raise BadRecord("empty conversation")
    if not isinstance(turns, list):
        raise BadRecord(f'"conversations" is a {type(turns).__name__}, not a list of turns')
    if kind not in TYPES:
        raise BadRecord(f'"type" is {kind!r}, not one of {", ".join(map(str, TYPES))}')
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise BadRecord(f'turn {number}: a {type(turn).__name__}, not an object with "from" and "value"')
        for key in ("from", "value"):
            if not isinstance(turn.get(key), str):
                raise BadRecord(f'turn {number}: "{key}" is a {type(turn.get(key)).__name__}, not a string')
        if not isinstance(turn.get("label"), str | None):
            raise BadRecord(f'turn {number}: "label" is a {type(turn["label"]).__name__}, not a string or null')
    if not isinstance(record.get("system"), str | None):
        raise BadRecord(f'"system" is a {type(record.get("system")).__name__}, not a string')
    speakers = sorted({turn["from"] for turn in turns})
    masked = {mask} if mask in speakers else {role.strip() for role in str(mask).split(",")}
    for role in sorted(masked.difference(speakers)):
        raise BadRecord(f'the role to mask is {role!r}, the roles are {", ".join(speakers)} (unknown role in "mask")')
    return turns, masked, kind
