"""HTML that is escaped by construction: `tag` escapes every child and attribute that is not markup already."""

import html

VOID = ("input", "meta")  # elements that have no end


class Markup(str):
    """Text that is HTML; a plain `str` is text to be escaped."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: str | float | bool | None) -> Markup:
    """One element with its children.

    Args:
        children: markup, or text to escape.
        attributes: `class_` stands for class, `data_key` for data-key; None leaves one out, True gives it no value.
    """
    written = []
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            written.append(f" {key}")
        elif value is not None and value is not False:
            written.append(f' {key}="{html.escape(str(value))}"')
    start = f"<{name}{''.join(written)}>"
    return Markup(start if name in VOID else f"{start}{join(*children)}</{name}>")


def join(*children: str) -> Markup:
    """Children one after another, escaped where they are plain text."""
    return Markup("".join(child if isinstance(child, Markup) else html.escape(child) for child in children))


def printable(text: str) -> str:
    """Text that can be written as UTF-8: of names of files and keys of JSON that are none, the code of what is not."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def table(head: list[str], rows: list[list[str]], **attributes: str) -> Markup:
    """A table whose rows begin with a heading; it scrolls by itself where it is wider than the page."""
    top = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head)))
    body = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
    return tag("div", tag("table", top, tag("tbody", *body), **attributes), class_="scroll")
