"""`megakd cache import` and `export`: NeMo-Aligner's JSONL chunks in and out.

The import writes two things: the cache, and a token file with the samples and their masks, which is what training reads
as data.train. Both appear when everything is read; an import that was killed goes on after its last whole shard.
"""

import argparse
import collections
import itertools
import pathlib
from collections.abc import Iterator

import numpy as np

from megakd import __version__
from megakd.cache import Contents, Header, encode_row, finish, publish_part, read_header, writing
from megakd.cache.aligner import CHUNK, Sample, check_exportable, find_chunks, format_line, parse_line, to_row
from megakd.cache.shard import ShardWriter
from megakd.errors import CacheError
from megakd.targets import sample_key


def run_import(arguments: argparse.Namespace) -> int:
    """Import all chunks."""
    from megakd.data.indexed import TokenFileWriter
    from megakd.data.tokenizers import load_tokenizer

    tokenizer, files = load_tokenizer(arguments.tokenizer), find_chunks(arguments.input)
    counts = [count_lines(path) for path in files]
    vocab_size = arguments.vocab_size or tokenizer.vocab_size
    first = next((sample for sample, _ in read_samples(files[:1]) if sample is not None), None)
    if first is None:
        raise CacheError(f"{files[0]} holds no sample with a supervised position", hint="look at its loss_mask")
    header = import_header(arguments, tokenizer, first.ids_TK.shape[1], vocab_size, files, counts)
    scaled = collections.Counter()
    token_file = TokenFileWriter(
        arguments.data,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=vocab_size,
        eos_appended=False,
        masked=True,
    )
    with writing(arguments.output, header) as whole, token_file:
        samples = read_samples(files)
        for part in range(header.parts):
            lines, shard = itertools.islice(samples, arguments.shard_samples), ShardWriter()
            for sample, where in lines:
                if sample is None:
                    scaled["empty"] += 1
                    continue
                check_ids(sample, vocab_size, where)
                token_file.add(np.append(sample.ids_S, sample.last_label), np.append(False, sample.mask_S))
                if part not in whole:
                    row, above = to_row(sample, sample_key(sample.ids_S), vocab_size, where)
                    scaled["tokens"] += above
                    try:
                        shard.add(encode_row(row, header.contents))
                    except ValueError as error:
                        raise CacheError(f"{where}: {error}", hint="all lines must have the same K") from error
            if part not in whole:
                publish_part(arguments.output, part, shard)
        header = finish(arguments.output, header)
    print(
        f"{arguments.output}: {header.rows:,} samples, {header.tokens:,} tokens, {header.contents.top_k} entries each; "
        f"{scaled['empty']} lines without a supervised position left out, {scaled['tokens']} tokens scaled down to 1\n"
        f"{arguments.data}: the samples; train with data.train={arguments.data} teacher.cache={arguments.output}"
    )
    return 0


def import_header(arguments, tokenizer, top_k: int, vocab_size: int, files, counts) -> Header:
    """The header of an import that has not begun."""
    lines = sum(counts)
    return Header(
        contents=Contents(vocab_size, top_k, (1.0,), arguments.codec),
        mode="imported",
        options={"format": "NeMo-Aligner"},
        tail="derived",
        tokenizer_fingerprint=tokenizer.fingerprint,
        teacher_fingerprint="",
        data={
            "imported": [[path.name, path.stat().st_size] for path in files],
            "lines": lines,
            "shard_samples": arguments.shard_samples,
        },
        parts=-(-lines // arguments.shard_samples),
        created={"command": f"megakd cache import --input {arguments.input}", "megakd_version": __version__},
    )


def count_lines(path: pathlib.Path) -> int:
    """Lines of a file, a last one without newline included."""
    lines, last = 0, b"\n"
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            lines, last = lines + block.count(b"\n"), block[-1:]
    return lines + (last != b"\n")


def read_samples(files: list[pathlib.Path]) -> Iterator[tuple[Sample | None, str]]:
    """(sample, where it stands) of every line of every file."""
    from tqdm import tqdm

    with tqdm(total=sum(path.stat().st_size for path in files), unit="B", unit_scale=True, leave=False) as bar:
        for path in files:
            with open(path, encoding="utf-8") as file:
                for number, line in enumerate(file, start=1):
                    where = f"{path}, line {number}"
                    yield (parse_line(line, where) if line.strip() else None), where
                    bar.update(len(line))


def check_ids(sample: Sample, vocab_size: int, where: str) -> None:
    largest = max(int(sample.ids_S.max()), sample.last_label)
    if largest >= vocab_size or min(int(sample.ids_S.min()), sample.last_label) < 0:
        raise CacheError(
            f"{where}: token {largest} in a vocabulary of {vocab_size}",
            hint="is it the right tokenizer? --vocab-size gives the model's vocabulary where that is larger",
        )


def run_export(arguments: argparse.Namespace) -> int:
    """Export every sample of the token file that the cache holds."""
    from megakd.cache import CacheReader
    from megakd.cache.samples import read_sample
    from megakd.data.indexed import TokenFile

    header = read_header(arguments.cache)
    check_exportable(arguments.cache, header.contents, header.mode)
    if CHUNK not in arguments.output and arguments.chunks > 1:
        raise CacheError(
            f"--output {arguments.output} names one file for {arguments.chunks} chunks", hint=f"add {CHUNK}"
        )
    file = TokenFile(arguments.data, header.tokenizer_fingerprint)
    length = arguments.sequence_length or header.data.get("sequence_length") or int(file.lengths.max())
    data = open_samples(arguments.data, length)
    reader = CacheReader(arguments.cache, temperature=header.contents.temperatures[0])
    written, size = 0, -(-len(data) // arguments.chunks)
    for chunk in range(arguments.chunks):
        path = pathlib.Path(arguments.output.replace(CHUNK, str(chunk)))
        partial = path.with_name(path.name + ".incomplete")
        with open(partial, "w", encoding="utf-8") as out:
            for index in range(chunk * size, min((chunk + 1) * size, len(data))):
                sample = data.sample(0, index)
                known = read_sample(sample["ids"], sample["labels"])
                row = reader.find(*known)
                if row is not None:
                    labels_S = np.append(sample["ids"][1:], max(known.last_label, 0))
                    out.write(format_line(sample["ids"], labels_S, row, header.contents) + "\n")
                    written += 1
        partial.replace(path)
    print(f"{arguments.output}: {written:,} of {header.rows:,} samples in {arguments.chunks} chunks")
    return 0


def open_samples(prefix: pathlib.Path, sequence_length: int):
    """The samples of a token file: its documents if it is masked, else windows of running text in stored order."""
    from megakd.data.dataset import TextDataset
    from megakd.data.indexed import load_info
    from megakd.data.samples import SampleDataset

    if load_info(prefix).masked:
        return SampleDataset(prefix, sequence_length)
    return TextDataset(prefix, sequence_length, None)
