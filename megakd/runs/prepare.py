"""`megakd prepare`: train a tokenizer, and turn text into the token files that training reads.

    megakd prepare tokenizer --input FILES_OR_FOLDERS --output TOK.model --vocab-size N
    megakd prepare text      --input FILES_OR_FOLDERS --tokenizer TOK.model --output PREFIX

Text files are one document each; `.jsonl` files hold one `{"text": ...}` a line. Progress goes to stderr, the summary
to stdout.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from megakd.data.documents import DEFAULT_SUFFIXES, Document, Problems, find_files, read_documents
from megakd.errors import DataError

_BATCH_CHARACTERS = 1 << 22  # text handed to the tokenizer at a time


def main(argv: list[str]) -> int:
    """Run `megakd prepare ARGV...`; returns the exit code 0, or raises DataError."""
    arguments = build_parser().parse_args(argv)
    return arguments.run(arguments)


def build_parser() -> argparse.ArgumentParser:
    """The flags of every `prepare` verb."""
    parser = argparse.ArgumentParser(prog="megakd prepare", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    tokenizer = verbs.add_parser("tokenizer", help="train a SentencePiece tokenizer that reproduces every text exactly")
    _add_input(tokenizer)
    tokenizer.add_argument("--output", required=True, type=Path, metavar="TOK.model", help="the model file to write")
    tokenizer.add_argument("--vocab-size", required=True, type=int, metavar="N", help="exact number of ids")
    tokenizer.add_argument("--type", choices=("bpe", "unigram"), default="bpe", help="algorithm (default: %(default)s)")
    tokenizer.add_argument(
        "--max-bytes", type=int, default=100_000_000, metavar="N",
        help="train on at most this much text, taken evenly from the whole input (default: %(default)s)",
    )  # fmt: skip
    tokenizer.set_defaults(run=prepare_tokenizer)
    text = verbs.add_parser("text", help="tokenize text into PREFIX.bin, PREFIX.idx, PREFIX.json (Megatron's format)")
    _add_input(text)
    text.add_argument("--tokenizer", required=True, type=Path, metavar="TOK.model", help="the tokenizer to use")
    text.add_argument("--output", required=True, type=Path, metavar="PREFIX", help="where to write, without ending")
    text.add_argument("--no-eos", action="store_true", help="do not end every document with the tokenizer's eos")
    text.set_defaults(run=prepare_text)
    return parser


def _add_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", required=True, nargs="+", metavar="PATH", help="files, and folders to search")
    parser.add_argument(
        "--suffix", default=",".join(DEFAULT_SUFFIXES), metavar=".A,.B",
        help="endings of the files taken from folders (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--on-error", choices=("raise", "skip"), default="raise",
        help="what to do about records that cannot be read: stop and name them, or leave them out and say how many",
    )  # fmt: skip


def prepare_tokenizer(arguments: argparse.Namespace) -> int:
    """Train a tokenizer on the input and write it."""
    from megakd.data.sentencepiece_tokenizer import train_sentencepiece

    if arguments.vocab_size < 1:
        raise DataError(f"--vocab-size must be positive, got {arguments.vocab_size}")
    files = find_files(arguments.input, arguments.suffix.split(","))
    problems = Problems(arguments.on_error)
    share = min(1.0, arguments.max_bytes / max(1, sum(path.stat().st_size for path in files)))
    documents = _with_progress(files, read_documents(files, problems))

    def texts() -> Iterator[str]:
        for document in documents:
            yield document.text
        problems.check()

    started = time.monotonic()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = train_sentencepiece(
        texts(), arguments.output, vocab_size=arguments.vocab_size, model_type=arguments.type, share=share
    )
    kept = "" if share == 1.0 else f", on {100 * share:.1f} % of the text (--max-bytes)"
    _report_skipped(problems)
    print(
        f"{arguments.output}: {tokenizer.vocab_size} ids, fingerprint {tokenizer.fingerprint[:12]}, "
        f"{time.monotonic() - started:.1f} s{kept}"
    )
    return 0


def prepare_text(arguments: argparse.Namespace) -> int:
    """Tokenize the input into one token file."""
    from megakd.data.indexed import TokenFileWriter
    from megakd.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(arguments.tokenizer)
    files = find_files(arguments.input, arguments.suffix.split(","))
    problems = Problems(arguments.on_error)
    if tokenizer.eos_id is None and not arguments.no_eos:
        raise DataError(f"tokenizer {arguments.tokenizer} has no eos to end documents with", hint="--no-eos")
    ending = [] if arguments.no_eos else [tokenizer.eos_id]
    started = time.monotonic()
    input_bytes = empty = 0
    writer = TokenFileWriter(
        arguments.output,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eos_appended=bool(ending),
    )
    with writer:
        for batch in _batches(_with_progress(files, read_documents(files, problems))):
            input_bytes += sum(document.input_bytes for document in batch)
            texts = [document.text for document in batch if document.text]
            empty += len(batch) - len(texts)
            if problems.count and problems.on_error == "raise":
                continue  # only reading on, to name every problem
            for ids in tokenizer.encode_batch(texts):
                writer.add(ids + ending)
        problems.check()
    seconds = time.monotonic() - started
    _report_skipped(problems)
    if empty:
        print(f"left out {empty} empty documents")
    print(
        f"{arguments.output}: {writer.documents:,} documents, {writer.tokens:,} tokens from {input_bytes:,} bytes, "
        f"{seconds:.1f} s, {input_bytes / 1e6 / seconds:.2f} MB/s, {writer.tokens / seconds:,.0f} tokens/s"
    )
    return 0


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    yield batch


def _with_progress(files: list[Path], documents: Iterator[Document]) -> Iterator[Document]:
    """Pass documents on under a progress bar over the input's bytes."""
    from tqdm import tqdm

    total = sum(path.stat().st_size for path in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="reading", leave=False) as bar:
        for document in documents:
            yield document
            bar.update(document.input_bytes)


def _report_skipped(problems: Problems) -> None:
    if problems.count:
        print(f"left out {problems.count} records (--on-error skip):\n{problems}")
