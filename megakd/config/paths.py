"""A key that is a path: checked and written out as `megakd.paths` does with flags."""

from typing import Annotated

from pydantic import AfterValidator

from megakd import paths
from megakd.config.section import Text, WrongValue


def local_path(text: str) -> str:
    """`megakd.paths.local_path`, whose refusal is of a value, not of its type."""
    try:
        return paths.local_path(text)
    except ValueError as error:
        raise WrongValue(str(error)) from error


LocalPath = Annotated[Text, AfterValidator(local_path)]
