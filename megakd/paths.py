"""Paths that a user writes: `~` is the home folder, and an address of a store elsewhere is no path."""

import argparse
import os
import pathlib
import re

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def local_path(text: str) -> str:
    """A path with `~` and `~user` written out.

    Raises:
        ValueError: it is an address such as s3://bucket/name, which would name a folder `s3:`.
    """
    if ADDRESS.match(text):
        raise ValueError(f"{text} is an address; expected a path in the file system (mount the store, or copy it here)")
    return os.path.expanduser(text)


def path_text(text: str) -> str:
    """`local_path` as the type of a flag."""
    try:
        return local_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def path_argument(text: str) -> pathlib.Path:
    """A flag's path."""
    return pathlib.Path(path_text(text))
