"""Records to ids and masks in one call, and tables to compare them with.

A table is a list of (text or special id, supervised); with the byte tokenizer a text's ids are its bytes.
"""

from megakd.data.formats import SampleFormat, build_formatter, detect_format
from megakd.data.tokenization import encode_sample

YES, NO = True, False


def encode(record, tokenizer, **choices):
    """(ids, mask) of a record."""
    ids, mask, _ = encode_with_notes(record, tokenizer, **choices)
    return ids, mask


def encode_with_notes(record, tokenizer, **choices):
    """(ids, mask, notes) of a record."""
    name = choices.pop("name", None) or detect_format(record, choices.get("columns", {}), "here")
    sample_format = SampleFormat(name, **choices)
    sample = build_formatter(sample_format, tokenizer)(record)
    ids, mask, notes = encode_sample(sample, tokenizer, sample_format)
    return ids.tolist(), mask.tolist(), [*sample.notes, *notes]


def table(*rows):
    """(ids, mask) of a table."""
    flat = [(i, supervised) for what, supervised in rows for i in ([what] if isinstance(what, int) else what.encode())]
    return [i for i, _ in flat], [supervised for _, supervised in flat]


def turns(*values):
    return [{"from": name, "value": value, **({"label": more[0]} if more else {})} for name, value, *more in values]
