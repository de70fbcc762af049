"""The flags behind the data section, for verbs that read records without a config."""

import argparse
import contextlib
import json
import os

from pydantic import ValidationError

from megakd.config import Data
from megakd.config.problems import explain
from megakd.data.formats import FORMATS
from megakd.errors import DataError


def add_format(parser: argparse.ArgumentParser) -> None:
    """The flags behind data.format and what else says what records mean."""
    parser.add_argument("--format", choices=("auto", *FORMATS), default="auto", help="data.format (default: auto)")
    parser.add_argument(
        "--column", action="append", default=[], metavar="NAME=KEY", help="data.columns: the records' KEY is NAME here"
    )
    parser.add_argument("--template", default="{input} {output}", help='data.template (default: "%(default)s")')
    parser.add_argument("--chat-template", metavar="FILE", help="data.chat_template")
    parser.add_argument(
        "--chat-argument", action="append", default=[], metavar="NAME=VALUE",
        help="data.chat_template_kwargs: what else the chat template sees; VALUE is JSON, or else a text",
    )  # fmt: skip
    parser.add_argument("--bos", action="store_true", help="data.add_bos=true")


def add_learning(parser: argparse.ArgumentParser) -> None:
    """The flags behind what of a record is learnt."""
    parser.add_argument("--truncation", choices=("end", "left", "right"), default="end", help="data.truncation")
    parser.add_argument("--truncation-field", default="input", metavar="NAME", help="data.truncation_field")
    parser.add_argument("--all-tokens", action="store_true", help="data.answer_only_loss=false")


def add_strict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--strict", action="store_true", help="data.strict: refuse records with text that is not used")


def learning(arguments: argparse.Namespace) -> dict:
    """Fields of the section behind `add_learning`, `add_strict` and --workers."""
    return {
        "answer_only_loss": not arguments.all_tokens,
        "strict": arguments.strict,
        "truncation": arguments.truncation,
        "truncation_field": arguments.truncation_field,
        "workers": arguments.workers,
    }


def data_section(arguments: argparse.Namespace, source, sequence_length: int, **more) -> Data:
    """The flags of `add_format` and --on-error as the config's section; `more` are further fields."""
    for path in [source] if isinstance(source, str) else source:
        if path.encode("utf-8", "ignore") != os.fsencode(path):
            raise DataError(f"the name {path!r} is no UTF-8, and a config cannot hold it", hint="rename the file")
    try:
        return Data(
            train=source, sequence_length=sequence_length, format=arguments.format, template=arguments.template,
            columns=_pairs("--column", "NAME=KEY, as in --column input=question", arguments.column),
            chat_template=arguments.chat_template, chat_template_kwargs=_chat_arguments(arguments),
            add_bos=arguments.bos, on_error=arguments.on_error, **more,
        )  # fmt: skip
    except ValidationError as error:
        explained = explain(error, Data, "flags")
        explained.hint = "each is the flag of that name; `megakd prepare VERB --help` lists them"
        raise explained from error


def _chat_arguments(arguments: argparse.Namespace) -> dict:
    given = {}
    for name, text in _pairs("--chat-argument", "NAME=VALUE", arguments.chat_argument).items():
        given[name] = text
        with contextlib.suppress(ValueError):
            given[name] = json.loads(text)
    return given


def _pairs(flag: str, expected: str, given: list[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in given]
    if not all(name and value for name, _, value in pairs):
        raise DataError(f"{flag} {' '.join(given)}: expected {expected}")
    return {name: value for name, _, value in pairs}
