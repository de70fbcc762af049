"""Reading every byte of a cache: digests, checksums, and whether what they protect makes sense."""

import pathlib
from collections.abc import Callable

import numpy as np

from megakd.cache.head import check_head_file, check_head_fits
from megakd.cache.header import Header, ShardRecord, read_header
from megakd.cache.index import Index
from megakd.cache.reader import check_finished
from megakd.cache.row import HiddenRow, decode_row
from megakd.cache.shard import Shard, check_file
from megakd.cache.tables import build_table
from megakd.errors import CacheError

MASS_TOLERANCE = 1e-3
NAMED = 10  # problems that a message lists


def verify(folder, progress: Callable[[ShardRecord], None] = lambda record: None) -> Header:
    """Check all files of a cache, all rows, and that the index finds every one of them.

    Args:
        progress: called after each shard.
    Returns:
        The header.
    Raises:
        CacheError: with everything that is wrong, shard by shard.
    """
    folder = pathlib.Path(folder)
    header = read_header(folder)
    check_finished(folder, header)
    index, problems = Index(folder, header), []
    if len(index) != header.rows:
        problems.append(f"the index has {len(index)} rows, the shards {header.rows}")
    if header.contents.hidden_size:
        try:
            check_head_fits(folder, header)
            check_head_file(folder, header.head)
        except CacheError as error:
            problems.append(error.args[0])
    for number, record in enumerate(header.shards):
        try:
            check_file(folder, record)
        except CacheError as error:
            problems.append(error.args[0])
        else:
            problems += check_rows(Shard(folder, record, check=False), number, header, index)
        progress(record)
    if problems:
        more = f"\n  and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise CacheError(
            f"{folder} is damaged:" + "".join(f"\n  {problem}" for problem in problems[:NAMED]) + more,
            hint="copy the named shards again, or delete them and start the same `megakd cache` again",
        )
    return header


def check_rows(shard: Shard, number: int, header: Header, index: Index) -> list[str]:
    """What is wrong with the rows of a shard whose bytes are as they were written."""
    problems = []
    for row_number in range(len(shard)):
        encoded = shard.row(row_number)
        where = f"{shard.path}, row {row_number}"
        try:
            row = decode_row(encoded, header.contents)
        except CacheError as error:
            problems.append(f"{where}: {error.args[0]}")
            continue
        if (number, row_number) not in index.find(encoded.key):
            problems.append(f"{where}: the index does not find its key")
        if isinstance(row, HiddenRow):
            continue
        table = build_table(row)
        mass_T = np.exp(table.logprobs_TK.astype(np.float64)).sum(1) + np.exp(table.log_tail_T.astype(np.float64))
        wrong_T = ~(np.abs(mass_T - 1) <= MASS_TOLERANCE)
        if wrong_T.any():
            token = int(np.flatnonzero(wrong_T)[0])
            problems.append(f"{where}: entries and tail of token {token} sum to {mass_T[token]:.6g}, expected 1")
    return problems
