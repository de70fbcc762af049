"""What a section of the configuration is: frozen typed keys, and rules between them; the number types keys use."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
AboveOne = Annotated[float, Field(gt=1, allow_inf_nan=False)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Text = Annotated[str, Field(min_length=1)]


class WrongValue(ValueError):
    """A value of the right type that cannot be meant; the text says why and what was expected."""


class BrokenRules(ValueError):
    """Rules between fields that do not hold.

    Args:
        problems: (key relative to the section, what is wrong) pairs.
    """

    def __init__(self, problems: list[tuple[str, str]]):
        super().__init__("; ".join(f"{key}: {text}" for key, text in problems))
        self.problems = problems


def seconds_of(duration: str) -> int:
    """`3h50m` as seconds; days, hours, minutes and seconds in that order, each once at most.

    Raises:
        WrongValue: it is no such text, or no time at all.
    """
    parts = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", duration.strip())
    seconds = (
        sum(int(n or 0) * unit for n, unit in zip(parts.groups(), (86400, 3600, 60, 1), strict=True)) if parts else 0
    )
    if not seconds:
        raise WrongValue(f"{duration!r}; expected a time such as 3h50m, 45m or 1d12h")
    return seconds


@dataclass(frozen=True)
class Named:
    """What a type is called in the help, where its own name says too little."""

    words: str


def _duration(text: str) -> str:
    seconds_of(text)
    return text


Duration = Annotated[str, Field(min_length=1), AfterValidator(_duration), Named("time such as 3h50m")]


class Section(BaseModel):
    """A frozen group of keys: exact types (20.0 is no integer, "3" no number, true no 1), no unknown key."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, protected_namespaces=()
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yields (key relative to this section, what is wrong) for every rule between fields that is broken."""
        yield from ()

    @model_validator(mode="after")
    def _check_rules(self):
        if problems := list(self.problems()):
            raise BrokenRules(problems)
        return self
