"""Conversations in the forms that people keep them in, as the turns that a chat template sees.

    {"messages": [{"role", "content"}]}                       chat templates' own
    {"conversations": [{"from", "value"}]}                    ShareGPT; from: human, gpt, system, tool, ...
    {"prompt": [turns], "completion": [turns]}                TRL; what the completion says is learnt
    {"prompt" or "input": text, "completion" or "output": text}, {"instruction", "input"?, "output"}
    besides: "system" (a text), "tools" (a list, or JSON), "chat_template_kwargs"

A turn may have "weight": 0, as OpenAI's fine-tuning files do: it is not learnt.
"""

import json
from dataclasses import dataclass

from megakd.data.chat_template import BadRecord, ChatTemplate
from megakd.data.fields import Fields

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "function_call": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function": "function",
}  # fmt: skip


@dataclass
class Conversation:
    """One conversation.

    Attributes:
        messages: its turns, each with "role" and "content".
        learnt: for each turn whether it is to be supervised.
        tools, arguments: what else the template is given.
    """

    messages: list[dict]
    learnt: list[bool]
    tools: list | None
    arguments: dict


def is_sharegpt(turns) -> bool:
    """Whether turns are ShareGPT's or a chat template's, not NeMo's."""
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        return False
    return all("role" in turn for turn in turns) or all(turn.get("from") in SHAREGPT_ROLES for turn in turns)


def read_conversation(fields: Fields, *, answered: bool = True) -> Conversation:
    """The conversation of a record.

    Args:
        answered: there has to be something to learn; False: completions of pairs may be missing, and are left out.
    Raises:
        BadRecord: there is none, or a turn is not what it should be.
    """
    given, turns = _turns(fields, answered)
    messages = [_message(number, turn) for number, turn in enumerate([*given, *turns], 1)]
    learnt = [
        number >= len(given) and message["role"] == "assistant" and _weight(number, message) != 0
        for number, message in enumerate(messages)
    ]
    system = fields.get("system")
    if not isinstance(system, str | None):
        raise BadRecord(f'"system" is a {type(system).__name__}, not a string')
    if system and system.strip():
        if messages[0]["role"] == "system":
            raise BadRecord('there is a "system" text, and the first turn is the system\'s')
        messages, learnt = [{"role": "system", "content": system}, *messages], [False, *learnt]
    arguments = fields.get("chat_template_kwargs") or {}
    if not isinstance(arguments, dict):
        raise BadRecord(f'"chat_template_kwargs" is a {type(arguments).__name__}, not an object')
    return Conversation(messages, learnt, _tools(fields.get("tools")), arguments)


def unused_by(template: ChatTemplate, conversation: Conversation) -> list[str]:
    """What a conversation holds that a template never mentions."""
    seen = {key for m in conversation.messages for key, value in m.items() if value not in (None, "", [], {})}
    keys = sorted(key for key in seen - {"role", "content", "weight"} if not template.mentions(key))
    notes = [f'"{key}" of turns is not used by the chat template' for key in keys]
    notes += [
        f'"{key}" of chat_template_kwargs is not used by the chat template'
        for key in conversation.arguments
        if not template.mentions(key)
    ]
    if conversation.tools and not template.mentions("tools"):
        notes.append('"tools" is not used by the chat template')
    return notes


def flatten_parts(template: ChatTemplate, messages: list[dict]) -> list[dict]:
    """Messages whose contents in parts are one text each, unless the template takes parts itself."""
    if template.reads_key("text"):
        return messages
    return [
        m | {"content": "".join(part["text"] for part in m["content"])} if isinstance(m.get("content"), list) else m
        for m in messages
    ]


def _turns(fields: Fields, answered: bool) -> tuple[list, list]:
    """(turns that are given, turns to learn from)."""
    for name in ("messages", "conversations"):
        if name in fields:
            return [], _list(fields, name)
    prompt, completion = fields.first_of("prompt", "input"), fields.first_of("completion", "output")
    complete = completion in fields or not answered
    if "instruction" in fields and complete:
        question = instruction_of(fields)
    elif prompt in fields and complete:
        if isinstance(fields.get(prompt), list):
            return _list(fields, prompt), _list(fields, completion) if answered else []
        question = fields.text(prompt)
    else:
        return [], _list(fields, "messages")
    answer = [{"role": "assistant", "content": fields.text(completion)}] if answered else []
    return [{"role": "user", "content": question}], answer


def instruction_of(fields: Fields) -> str:
    """An Alpaca record's instruction, and its input below an empty line where there is one."""
    parts = [fields.text("instruction")]
    if fields.get("input") is not None:
        parts.append(fields.text("input"))
    return "\n\n".join(part for part in parts if part.strip())


def _list(fields: Fields, name: str) -> list:
    turns = fields.get(name)
    if turns == []:
        raise BadRecord("empty conversation")
    if not isinstance(turns, list):
        raise BadRecord(fields.missing(name, "a list of turns"))
    return turns


def _message(number: int, turn) -> dict:
    if isinstance(turn, dict) and "from" in turn and "role" not in turn:
        said = turn["from"]
        turn = {"role": SHAREGPT_ROLES.get(said, said), "content": turn.get("value"),
                **{key: value for key, value in turn.items() if key not in ("from", "value")}}  # fmt: skip
    role = turn.get("role") if isinstance(turn, dict) else None
    if role not in ROLES:
        raise BadRecord(f"turn {number}: unknown role {role!r} (known: {', '.join(ROLES)})")
    content = turn.get("content")
    if isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind != "text" or not isinstance(part.get("text"), str):
                raise BadRecord(f"turn {number}: a part of its content is {kind!r}; only parts of text are read")
    elif not isinstance(content, str) and not (content is None and turn.get("tool_calls")):
        raise BadRecord(f'turn {number}: "content" is a {type(content).__name__}, not a string')
    return turn


def _weight(number: int, message: dict) -> int:
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise BadRecord(f'turn {number + 1}: "weight" is {weight!r}, not 0 or 1')
    return 1 if weight is None else int(weight)


def _tools(tools) -> list | None:
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise BadRecord(f'"tools" is no JSON ({error})') from error
    if tools in (None, "", []):
        return None
    if not isinstance(tools, list):
        raise BadRecord(f'"tools" is a {type(tools).__name__}, not a list')
    return tools
