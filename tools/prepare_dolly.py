"""Dolly (databricks-dolly-15k) to prompt-response JSONL.

    python tools/prepare_dolly.py --input databricks-dolly-15k.jsonl --output data/dolly

Reads the public file (JSONL, JSONL.gz or Parquet: instruction, context, response, category) and writes
OUTPUT/train.jsonl and OUTPUT/val.jsonl with {"input", "output", "category"}. Where there is a context, input is the
instruction and the context with an empty line between them, in random order. Equal files and seeds give equal files.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megakd.data.blocks import read_blocks
from megakd.data.files import find_files
from megakd.data.order import permute
from megakd.data.records import Problems, records_of, write_records
from megakd.errors import MegakdError

FIELDS = ("instruction", "context", "response")


def read_rows(files: Sequence[Path], problems: Problems) -> Iterator[dict[str, str]]:
    """Rows with an instruction and a response; any other becomes a problem."""
    for block in read_blocks(files):
        for where, record in records_of(block, problems):
            row = {name: record.get(name) for name in FIELDS}
            wrong = [name for name, value in row.items() if not isinstance(value, str)]
            wrong += [name for name in ("instruction", "response") if row[name] == ""]
            if wrong:
                problems.add(where, f"no text under {', '.join(wrong)} (found {', '.join(sorted(map(str, record)))})")
            else:
                yield {**row, "category": record.get("category") or ""}


def to_prompt_response(row: dict[str, str], context_first: bool) -> dict[str, str]:
    """One sample."""
    parts = [row["instruction"].strip(), row["context"].strip()]
    if context_first:
        parts.reverse()
    return {"input": "\n\n".join(filter(None, parts)), "output": row["response"], "category": row["category"]}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", required=True, nargs="+", metavar="PATH", help="the public file, or its folder")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="where train and val are written")
    parser.add_argument("--validation", type=float, default=0.05, metavar="SHARE", help="held out (default: 0.05)")
    parser.add_argument("--seed", type=int, default=1234, help="of the split and the orders (default: 1234)")
    parser.add_argument("--on-error", choices=("raise", "skip"), default="raise", help="rows that cannot be used")
    arguments = parser.parse_args(argv)
    try:
        problems = Problems(arguments.on_error)
        rows = list(read_rows(find_files(arguments.input, (".jsonl", ".jsonl.gz", ".parquet")), problems))
        problems.check()
    except MegakdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if problems.count:
        print(f"left out {problems.count} rows:\n{problems}")
    coins = permute(range(len(rows)), len(rows), arguments.seed, 1) % 2
    samples = [to_prompt_response(row, bool(coin)) for row, coin in zip(rows, coins, strict=True)]
    order = permute(range(len(rows)), len(rows), arguments.seed, 2)
    held_out = round(arguments.validation * len(rows))
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, places in (("train", order[held_out:]), ("val", order[:held_out])):
        write_records(arguments.output / f"{name}.jsonl", [samples[place] for place in places])
        print(f"{arguments.output / name}.jsonl: {len(places):,} samples")
    return 0


if __name__ == "__main__":
    sys.exit(main())
