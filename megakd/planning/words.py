"""Numbers as people say them."""


def large(number: int) -> str:
    """`13.0 B`, `1.24 M`, `97`."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:,}"
