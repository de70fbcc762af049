"""`megakd cache import` and `export`: NeMo-Aligner's JSONL chunks in and out.

The import writes two things: the cache, and a token file with the samples and their masks, which is what training reads
as data.train. Both appear when everything is read; an import that was killed goes on after its last whole shard.
"""

import argparse
import collections
import hashlib
import itertools
import pathlib
from collections.abc import Iterator

import numpy as np

from megakd import __version__
from megakd.cache import Contents, Header, encode_row, finish, publish_part, read_header, writing
from megakd.cache.aligner import (
    CHUNK,
    Sample,
    check_exportable,
    find_chunks,
    format_line,
    parse_line,
    to_row,
    wrong,
)
from megakd.cache.publish import publishing
from megakd.cache.shard import ShardWriter
from megakd.errors import CacheError
from megakd.progress import progress_bar
from megakd.targets import sample_key


def run_import(arguments: argparse.Namespace) -> int:
    """Import all chunks."""
    from megakd.checkpoints.folder import tokenizer_path
    from megakd.data.token_files.writer import TokenFileWriter
    from megakd.data.tokenizers.load import load_tokenizer

    tokenizer, files = load_tokenizer(tokenizer_path(arguments.tokenizer)), find_chunks(arguments.input)
    contents = [read_through(path) for path in files]
    vocab_size = arguments.vocab_size or tokenizer.vocab_size
    first = next((sample for sample, _ in read_samples(files[:1]) if sample is not None), None)
    if first is None:
        raise CacheError(f"{files[0]} holds no sample with a supervised position", hint="look at its loss_mask")
    header = import_header(arguments, tokenizer, first.ids_TK.shape[1], vocab_size, files, contents)
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
                if sample.ids_TK.shape[1] != header.contents.top_k:
                    raise wrong(
                        where,
                        f"it has {sample.ids_TK.shape[1]} entries a token, the first sample {header.contents.top_k}",
                    )
                if part not in whole:
                    row, above = to_row(sample, sample_key(sample.ids_S), vocab_size, where)
                    scaled["tokens"] += above
                    shard.add(encode_row(row, header.contents))
            if part not in whole:
                publish_part(arguments.output, part, shard)
        header = finish(arguments.output, header)
    print(
        f"{arguments.output}: {header.rows:,} samples, {header.tokens:,} tokens, {header.contents.top_k} entries each; "
        f"{scaled['empty']} lines without a supervised position left out, {scaled['tokens']} tokens scaled down to 1\n"
        f"{arguments.data}: the samples; train with data.train={arguments.data} teacher.cache={arguments.output}"
    )
    return 0


def import_header(arguments, tokenizer, top_k: int, vocab_size: int, files, contents) -> Header:
    """The header of an import that has not begun.

    Args:
        contents: what `read_through` says of each file.
    """
    lines = sum(count for count, _ in contents)
    return Header(
        contents=Contents(vocab_size, top_k, (1.0,), arguments.codec),
        mode="imported",
        options={"format": "NeMo-Aligner"},
        tail="derived",
        tokenizer_fingerprint=tokenizer.fingerprint,
        teacher_fingerprint="",
        data={
            "imported": [[path.name, digest] for path, (_, digest) in zip(files, contents, strict=True)],
            "lines": lines,
            "shard_samples": arguments.shard_samples,
        },
        parts=-(-lines // arguments.shard_samples),
        created={"command": f"megakd cache import --input {arguments.input}", "megakd_version": __version__},
    )


def read_through(path: pathlib.Path) -> tuple[int, str]:
    """Lines of a file, a last one without newline included, and the BLAKE2b-128 of its bytes."""
    lines, last, digest = 0, b"\n", hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            lines, last = lines + block.count(b"\n"), block[-1:]
            digest.update(block)
    return lines + (last != b"\n"), digest.hexdigest()


def read_samples(files: list[pathlib.Path]) -> Iterator[tuple[Sample | None, str]]:
    """(sample, where it stands) of every line of every file."""
    with progress_bar(sum(path.stat().st_size for path in files), "importing", unit="B") as bar:
        for path in files:
            with open(path, "rb") as file:
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
    from megakd.data.token_files.reader import TokenFile

    header = read_header(arguments.cache)
    check_exportable(arguments.cache, header.contents, header.mode)
    if CHUNK not in arguments.output and arguments.chunks > 1:
        raise CacheError(
            f"--output {arguments.output} names one file for {arguments.chunks} chunks", hint=f"add {CHUNK}"
        )
    file = TokenFile(arguments.data, header.tokenizer_fingerprint)
    recorded = [data["sequence_length"] for data in header.recordings() if "sequence_length" in data]
    length = arguments.sequence_length or (recorded[0] if recorded else int(file.lengths.max()))
    reader = CacheReader(arguments.cache, temperature=header.contents.temperatures[0])
    places = find_samples(reader, arguments.data, length)
    if not places:
        raise CacheError(
            f"{arguments.cache} holds none of the samples of {arguments.data}, read as sequences of {length} tokens",
            hint="--data takes the token file that was recorded, --sequence-length the data.sequence_length of then",
        )
    size, rest = divmod(len(places), arguments.chunks)
    if size == 0:
        raise CacheError(
            f"--chunks {arguments.chunks}, but there are {len(places)} samples", hint="at most one chunk for each"
        )
    for chunk in range(arguments.chunks + bool(rest)):
        last = (chunk + 1) * size if chunk < arguments.chunks else None
        path = arguments.output.replace(CHUNK, str(chunk))
        write_chunk(path, places[chunk * size : last], reader)
    print(
        f"{arguments.output}: {len(places):,} of {header.rows:,} samples: n_chunks={arguments.chunks} "
        f"n_examples_per_chunk={size}"
    )
    if rest:
        print(
            f"{arguments.output.replace(CHUNK, str(arguments.chunks))}: the remaining {rest}, which NeMo-Aligner does "
            "not read: its chunks are of one size"
        )
    return 0


def write_chunk(path: str, places: list[tuple], reader) -> None:
    """Publish one file of samples, each given as (data set, epoch, index)."""
    from megakd.cache.samples import read_sample

    with publishing(path) as partial, open(partial, "w", encoding="utf-8") as out:
        for data, epoch, index in places:
            sample = data.sample(epoch, index)
            known = read_sample(sample["ids"], sample["labels"])
            labels_S = np.append(sample["ids"][1:], max(known.last_label, 0))
            out.write(format_line(sample["ids"], labels_S, reader.find(*known), reader.header.contents) + "\n")


def find_samples(reader, prefix: pathlib.Path, sequence_length: int) -> list[tuple]:
    """(data set, epoch, index) of every sample of a token file that a cache holds.

    Of a masked file these are documents. Of running text they are windows: in stored order, as validation reads it, and
    in the recorded seeds' orders, as training does, epoch after epoch until one has none that is new.
    """
    from megakd.data.dataset import TextDataset
    from megakd.data.samples import SampleDataset
    from megakd.data.token_files.layout import load_info

    if load_info(prefix).masked:
        data, seen = SampleDataset(prefix, sequence_length), set()
        return [(data, 0, index) for index in range(len(data)) if holds(reader, data.sample(0, index), seen)]
    places, seen = [], set()
    for seed in dict.fromkeys([None, *(data.get("seed") for data in reader.header.recordings())]):
        data = TextDataset(prefix, sequence_length, seed)
        for epoch in itertools.count():
            found = [
                (data, epoch, index) for index in range(len(data)) if holds(reader, data.sample(epoch, index), seen)
            ]
            places += found
            if not found:
                break
    return places


def holds(reader, sample: dict, seen: set[tuple]) -> bool:
    """Whether a cache holds a sample's ids, and the sample has not been seen; now it has."""
    from megakd.cache.samples import read_sample

    key, mask_S, last_label = read_sample(sample["ids"], sample["labels"])
    known = (key, mask_S.tobytes(), last_label)
    new = known not in seen and bool(mask_S.any()) and bool(reader.index.find(key))
    seen.add(known)
    return new
