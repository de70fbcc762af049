"""Records that bring their token ids, as `megakd generate` writes them: nothing of them is tokenized.

{"prompt_ids": [...], "completion_ids": [...]}, and beside them texts for people (`prompt`, `completion`), how the
completion ended, and the beginning of the fingerprint of the tokenizer whose ids they are (`tokenizer`).
"""

from megakd.data.chat_template import BadRecord, Segment
from megakd.data.fields import Fields
from megakd.data.tokenizers.tokenizer import Tokenizer

SHOWN_DIGITS = 12  # of the tokenizer's fingerprint
LEAST_DIGITS = 8
DESCRIBING = ("finish_reason", "stop")


def ids_segments(fields: Fields, tokenizer: Tokenizer) -> tuple[list[Segment], tuple[list[int], list[int]]]:
    """Prompt and completion, as texts for people and as ids.

    Raises:
        BadRecord: a list of ids is missing or empty, or they are not this tokenizer's.
    """
    prompt, completion, *_ = (fields.get(name) for name in ("prompt", "completion", *DESCRIBING))
    prompt_ids, completion_ids = (read_ids(fields, name, tokenizer) for name in ("prompt_ids", "completion_ids"))
    if not completion_ids:
        raise BadRecord('nothing to learn from: "completion_ids" is empty')
    texts = (text if isinstance(text, str) else "" for text in (prompt, completion))
    segments = [Segment(text, learnt) for text, learnt in zip(texts, (False, True), strict=True)]
    return segments, (prompt_ids, completion_ids)


def read_ids(fields: Fields, name: str, tokenizer: Tokenizer) -> list[int]:
    """The ids under a name.

    Raises:
        BadRecord: there are none, one is no id of the tokenizer, or the record says that they are another's.
    """
    written_with = fields.get("tokenizer", tokenizer.fingerprint)
    known = isinstance(written_with, str) and len(written_with) >= LEAST_DIGITS
    if not known or not tokenizer.fingerprint.startswith(written_with):
        raise BadRecord(
            f"its ids are those of tokenizer {written_with!r}, not of {tokenizer.fingerprint[:SHOWN_DIGITS]}"
        )
    ids = fields.get(name)
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise BadRecord(fields.missing(name, "a list of ids"))
    if wrong := [i for i in ids if not 0 <= i < tokenizer.vocab_size]:
        raise BadRecord(f'"{name}" holds {wrong[0]}, and the ids of the tokenizer are 0 to {tokenizer.vocab_size - 1}')
    return ids
