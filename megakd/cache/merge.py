"""Several recordings made one: their shards side by side under one header and one index."""

import dataclasses
import json
import pathlib

from megakd import __version__
from megakd.cache.head import add_head, link_or_copy, whole_head
from megakd.cache.header import Header, ShardRecord, read_header
from megakd.cache.index import Index
from megakd.cache.publish import publishing
from megakd.cache.reader import check_finished
from megakd.cache.shard import check_head
from megakd.cache.writer import finish, shard_file, write_record, writing
from megakd.errors import CacheError

SAME = ("contents", "mode", "options", "tail", "tokenizer_fingerprint", "teacher_fingerprint", "head")


def merge(output, inputs: list, command: str, *, same_teacher: bool = False) -> tuple[Header, int]:
    """Join finished caches into a new folder; the inputs stay as they are.

    Shards are linked where the file system allows it and copied where not. A merge that was killed goes on when it is
    started again.

    Args:
        inputs: folders of caches of one teacher, tokenizer and contents, in the order their samples are to have.
        command: what made it, for the header.
        same_teacher: caches that were imported, and so do not know their teacher, have one all the same.
    Returns:
        The merged header, and how many rows have a key that another row has too.
    Raises:
        CacheError: an input is unfinished or damaged, or two were recorded differently, or may have been.
    """
    headers = [read_header(folder) for folder in inputs]
    for folder, header in zip(inputs, headers, strict=True):
        check_finished(pathlib.Path(folder), header)
        check_mergeable(inputs[0], headers[0], folder, header)
    if len(inputs) > 1 and not headers[0].teacher_fingerprint and not same_teacher:
        raise CacheError(
            f"{inputs[0]} and {inputs[1]} were imported, and do not say from which teacher their logits are",
            hint="if it was one and the same teacher, say so with --same-teacher",
        )
    sources = [
        (pathlib.Path(folder) / record.file, record)
        for folder, header in zip(inputs, headers, strict=True)
        for record in header.shards
    ]
    merged = dataclasses.replace(
        headers[0],
        data={"merged": [header.data for header in headers]},
        parts=len(sources),
        created={"command": command, "megakd_version": __version__},
        finished=False,
        shards=(),
        index=None,
        head=None,
    )
    output = pathlib.Path(output)
    with writing(output, merged) as whole:
        for part, (source, record) in enumerate(sources):
            if part not in whole:
                add_shard(output, part, source, record)
        if headers[0].head and whole_head(output, merged) is None:
            add_head(output, inputs[0], headers[0].head)
        merged = finish(output, merged)
    return merged, Index(output, merged).duplicates()


def check_mergeable(first, first_header: Header, other, other_header: Header) -> None:
    """Raises CacheError unless the two caches differ in nothing but their samples."""
    for name in SAME:
        a, b = (json.dumps(dataclasses.asdict(header)[name]) for header in (first_header, other_header))
        if a != b:
            raise CacheError(
                f"{first} and {other} cannot be one cache: {name} is {a} and {b}",
                hint="only recordings of one teacher with the same settings can be merged",
            )


def add_shard(output: pathlib.Path, part: int, source: pathlib.Path, record: ShardRecord) -> None:
    """Publish a copy or a link of a shard as a part, after a check of its head."""
    check_head(source, record)
    target = output / shard_file(part)
    with publishing(target) as partial:
        link_or_copy(source, partial)
    write_record(output, dataclasses.replace(record, file=target.name, part=part))
