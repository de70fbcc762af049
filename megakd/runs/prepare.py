"""`megakd prepare`: tokenizers and token files, made before a run, and a look at what a run would read.

    megakd prepare tokenizer --input FILES_OR_FOLDERS --output TOK.model --vocab-size N
    megakd prepare text      --input FILES_OR_FOLDERS --tokenizer TOK --output PREFIX
    megakd prepare samples   --input FILES_OR_FOLDERS --tokenizer TOK --output PREFIX [--format ...]
    megakd prepare adopt     PREFIX --tokenizer TOK
    megakd prepare inspect   DATA --tokenizer TOK --sequence-length N [--format ...]

Text files are one document each; JSONL, JSON, CSV, Parquet and Arrow files hold records. Progress goes to stderr, the
summary to stdout. A run tokenizes raw files by itself; `text` and `samples` do it elsewhere, or once for many.
"""

import argparse
import contextlib
import io
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from megakd.data.blocks import read_blocks
from megakd.data.files import DEFAULT_SUFFIXES, find_files
from megakd.data.formats import SampleFormat, texts_of
from megakd.data.records import Problems, records_of
from megakd.errors import DataError
from megakd.paths import path_argument, path_text
from megakd.processes import check_one_process
from megakd.runs.data_flags import add_format, add_learning, add_strict, data_section, learning


def main(argv: list[str]) -> int:
    """Run `megakd prepare ARGV...`; returns the exit code 0, or raises DataError."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold bytes that are no text
    arguments = build_parser().parse_args(argv)
    if arguments.run is not prepare_inspect:
        check_one_process("prepare", os.environ)
    return arguments.run(arguments)


def build_parser() -> argparse.ArgumentParser:
    """The flags of every `prepare` verb."""
    parser = argparse.ArgumentParser(prog="megakd prepare", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    tokenizer = verbs.add_parser("tokenizer", help="train a SentencePiece tokenizer that reproduces every text exactly")
    _add_input(tokenizer)
    tokenizer.add_argument(
        "--output", required=True, type=path_argument, metavar="TOK.model", help="the model file to write"
    )
    tokenizer.add_argument("--vocab-size", required=True, type=int, metavar="N", help="exact number of ids")
    tokenizer.add_argument("--type", choices=("bpe", "unigram"), default="bpe", help="algorithm (default: %(default)s)")
    tokenizer.add_argument(
        "--max-bytes", type=int, default=100_000_000, metavar="N",
        help="train on at most this much text, taken evenly from the whole input (default: %(default)s)",
    )  # fmt: skip
    tokenizer.set_defaults(run=prepare_tokenizer)

    text = verbs.add_parser("text", help="tokenize running text into PREFIX.bin, .idx, .json (Megatron's format)")
    _add_input(text)
    _add_output(text)
    text.set_defaults(run=prepare_text)

    samples = verbs.add_parser("samples", help="tokenize prompts with answers, or conversations; adds PREFIX.mask")
    _add_input(samples)
    _add_output(samples)
    add_format(samples)
    add_learning(samples)
    samples.add_argument("--sequence-length", type=int, metavar="N", help="data.sequence_length, for --truncation")
    samples.set_defaults(run=prepare_samples)

    adopt = verbs.add_parser(
        "adopt", help="describe .bin/.idx files that Megatron or NeMo wrote, so that runs read them"
    )
    adopt.add_argument("prefix", type=path_argument, metavar="PREFIX", help="the files, without ending")
    adopt.add_argument(
        "--tokenizer", required=True, type=path_text, metavar="TOK", help="the tokenizer they were written with"
    )
    adopt.set_defaults(run=prepare_adopt)

    inspect = verbs.add_parser("inspect", help="show samples with their supervised parts, lengths, and what is dropped")
    inspect.add_argument("data", type=path_text, metavar="DATA", help="as data.train: a file, a folder, or a prefix")
    inspect.add_argument("--tokenizer", required=True, type=path_text, metavar="TOK", help="the run's tokenizer")
    inspect.add_argument("--sequence-length", required=True, type=int, metavar="N", help="data.sequence_length")
    inspect.add_argument("--samples", type=int, default=3, metavar="N", help="how many to show (default: %(default)s)")
    inspect.add_argument("--packing", action="store_true", help="data.packing")
    inspect.add_argument("--png", type=path_argument, metavar="FILE", help="write the histogram as a picture too")
    inspect.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="of supervised parts")
    _add_on_error(inspect)
    add_strict(inspect)
    add_format(inspect)
    add_learning(inspect)
    inspect.set_defaults(run=prepare_inspect)
    return parser


def _add_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        type=path_text,
        metavar="PATH",
        help="files, patterns, and folders to search",
    )
    parser.add_argument(
        "--suffix", default=",".join(DEFAULT_SUFFIXES), metavar=".A,.B",
        help="endings of the files taken from folders (default: %(default)s)",
    )  # fmt: skip
    _add_on_error(parser)


def _add_on_error(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--on-error", choices=("raise", "skip"), default="raise",
        help="what to do about records that cannot be used: stop and name them, or leave them out and say how many",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each processor)")


def _add_output(parser: argparse.ArgumentParser) -> None:
    add_strict(parser)
    parser.add_argument(
        "--tokenizer",
        required=True,
        type=path_text,
        metavar="TOK",
        help="a tokenizer file, its folder, or a checkpoint",
    )
    parser.add_argument(
        "--output", required=True, type=path_argument, metavar="PREFIX", help="where to write, without ending"
    )
    parser.add_argument("--no-eos", action="store_true", help="do not end documents with the tokenizer's eos")


def prepare_tokenizer(arguments: argparse.Namespace) -> int:
    """Train a tokenizer on the texts of the input, whatever its format, and write it."""
    from megakd.data.tokenizers.sentencepiece import train_sentencepiece

    if arguments.vocab_size < 1:
        raise DataError(f"--vocab-size must be positive, got {arguments.vocab_size}")
    files = find_files(arguments.input, arguments.suffix.split(","))
    problems = Problems(arguments.on_error)
    share = min(1.0, arguments.max_bytes / max(1, sum(path.stat().st_size for path in files)))

    def texts() -> Iterator[str]:
        for block in read_blocks(files):
            for where, record in records_of(block, problems):
                found = texts_of(record)
                if not found:
                    problems.add(where, f"no text under a known key (found {', '.join(sorted(map(str, record)))})")
                yield from found
        problems.check()

    started = time.monotonic()
    with _writing(arguments.output):
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        tokenizer = train_sentencepiece(
            texts(), arguments.output, vocab_size=arguments.vocab_size, model_type=arguments.type, share=share
        )
    kept = "" if share == 1.0 else f", on {100 * share:.1f} % of the text (--max-bytes)"
    if problems.count:
        print(f"left out {problems.count} records (--on-error skip):\n{problems}")
    print(
        f"{arguments.output}: {tokenizer.vocab_size} ids, fingerprint {tokenizer.fingerprint[:12]}, "
        f"{time.monotonic() - started:.1f} s{kept}"
    )
    return 0


def prepare_text(arguments: argparse.Namespace) -> int:
    """Tokenize running text into one token file."""
    return _write(arguments, lambda files: SampleFormat("text", add_eos=not arguments.no_eos, strict=arguments.strict))


def prepare_samples(arguments: argparse.Namespace) -> int:
    """Tokenize samples of their own into one masked token file."""
    from megakd.data.sources import choose_format

    if arguments.truncation != "end" and arguments.sequence_length is None:
        raise DataError(f"--truncation {arguments.truncation} shortens to a length", hint="add --sequence-length N")
    length = 1 if arguments.sequence_length is None else arguments.sequence_length
    paths, ends = [str(path) for path in arguments.input], not arguments.no_eos
    data = data_section(arguments, paths, length, add_eos=ends, **learning(arguments))
    return _write(arguments, lambda files: choose_format(data, files))


def _write(arguments: argparse.Namespace, choose_format) -> int:
    from megakd.checkpoints.folder import tokenizer_path
    from megakd.data.tokenization import write_token_file
    from megakd.data.tokenizers.load import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_path(arguments.tokenizer))
    files = find_files(arguments.input, arguments.suffix.split(","))
    sample_format = choose_format(files)
    summary = write_token_file(
        files, arguments.output, tokenizer, sample_format, on_error=arguments.on_error, workers=arguments.workers
    )
    print(f"{arguments.output}: {sample_format.name}, {summary}")
    if summary.unused:
        print(f"not used: {summary.unused}; --strict refuses such records")
    return 0


def prepare_adopt(arguments: argparse.Namespace) -> int:
    """Check every token of .bin/.idx files written elsewhere against a tokenizer, and describe them."""
    from megakd.checkpoints.folder import tokenizer_path
    from megakd.data.token_files.adoption import describe
    from megakd.data.tokenizers.load import load_tokenizer

    info = describe(arguments.prefix, load_tokenizer(tokenizer_path(arguments.tokenizer)))
    print(f"{arguments.prefix}: {info.documents:,} documents, {info.tokens:,} tokens, all below {info.vocab_size}")
    return 0


def prepare_inspect(arguments: argparse.Namespace) -> int:
    """Open data as a run would and print what is in it."""
    from megakd.checkpoints.folder import tokenizer_path
    from megakd.data.inspection import describe_dataset, draw_lengths
    from megakd.data.sources import open_data
    from megakd.data.tokenizers.load import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_path(arguments.tokenizer))
    more = learning(arguments) | {"packing": arguments.packing}
    data = data_section(arguments, arguments.data, arguments.sequence_length, **more)
    dataset = open_data(data, data.train, tokenizer, seed=1234 if arguments.packing else None)
    color = arguments.color == "always" or (arguments.color == "auto" and sys.stdout.isatty())
    print(describe_dataset(dataset, tokenizer, samples=arguments.samples, color=color))
    if arguments.png:
        with _writing(arguments.png):
            arguments.png.parent.mkdir(parents=True, exist_ok=True)
            draw_lengths(dataset, arguments.png)
        print(f"lengths drawn to {arguments.png}")
    return 0


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Explain that a file cannot be written."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror} ({error.filename or path})", hint="write it elsewhere"
        ) from error
