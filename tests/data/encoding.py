"""Records to ids and masks in one call, and tables to compare them with.

A table is a list of (text or special id, supervised); with the byte tokenizer a text's ids are its bytes.
"""

from megakd.data.formats import SampleFormat, build_formatter, detect_format, encode_segments

YES, NO = True, False


def encode(record, tokenizer, **choices):
    name = choices.pop("name", None) or detect_format(record, choices.get("columns", {}), "here")
    sample_format = SampleFormat(name, **choices)
    return encode_segments(build_formatter(sample_format, tokenizer)(record), tokenizer, sample_format)


def table(*rows):
    """(ids, mask) of a table."""
    flat = [(i, supervised) for what, supervised in rows for i in ([what] if isinstance(what, int) else what.encode())]
    return [i for i, _ in flat], [supervised for _, supervised in flat]


def turns(*values):
    return [{"from": name, "value": value, **({"label": more[0]} if more else {})} for name, value, *more in values]
