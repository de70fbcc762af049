"""OpenAssistant (oasst1, oasst2) to chat JSONL in NeMo's format.

    python tools/prepare_openassistant.py --input 2023-04-12_oasst_ready.trees.jsonl.gz --output data/oasst

Reads the public files: conversation trees (*.trees.jsonl.gz), or messages with parent_id (*.messages.jsonl.gz, or the
Parquet files of the dataset's page). Writes OUTPUT/train.jsonl and OUTPUT/val.jsonl with {"system", "conversations":
[{"from": "User" | "Assistant", "value", "label"?}], "mask": "User", "type"}; a tree is in one of them only.

`--threads best` (default) takes one conversation a tree: of several replies the best ranked, and of replies without
ranks the first. `--threads all` takes every path from the root to a leaf. A conversation ends with the assistant;
what a user wrote last is cut off (with `all` it is kept, as NeMo's script does). Deleted messages are left out with
what hangs on them. `--labels` writes the annotators' ratings as labels and conditions on them (type VALUE_TO_TEXT).
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

ROLES = {"prompter": "User", "assistant": "Assistant"}
RATINGS = ("quality", "toxicity", "humor", "creativity")
SYSTEM = "A conversation between a user and a helpful assistant."


def read_trees(files: Sequence[Path], problems: Problems) -> list[dict]:
    """Root messages with their `replies`, in the order of the input, whichever form it is in."""
    roots: list[dict] = []
    messages: dict[str, dict] = {}
    for block in read_blocks(files):
        for where, record in records_of(block, problems):
            message = record.get("prompt", record)
            if wrong := what_is_wrong(message):
                problems.add(where, wrong)
            elif "prompt" in record:
                roots.append(message)
            else:
                messages[message["message_id"]] = {**message, "replies": []}
    for identity, message in messages.items():
        parent = message.get("parent_id")
        if parent is None:
            roots.append(message)
        elif parent in messages:
            messages[parent]["replies"].append(message)
        else:
            problems.add(f"message {identity}", f"its parent {parent} is not in the input")
    return roots


def what_is_wrong(message) -> str | None:
    """Why something is no message, or None; the replies of a tree are looked at too."""
    if not isinstance(message, dict) or not isinstance(message.get("text"), str):
        return 'no message with a "text"'
    if message.get("role") not in ROLES:
        return f"unknown role {message.get('role')!r} (known: {', '.join(ROLES)})"
    if not isinstance(message.get("message_id"), str):
        return 'no "message_id"'
    return next(filter(None, map(what_is_wrong, message.get("replies") or [])), None)


def threads(message: dict, best: bool) -> Iterator[list[dict]]:
    """The conversations that begin with a message: one, or one for each leaf."""
    replies = [reply for reply in message.get("replies") or [] if not reply.get("deleted")]
    if best:
        replies = sorted(replies, key=rank)[:1]
    for reply in replies:
        yield from ([message, *rest] for rest in threads(reply, best))
    if not replies:
        yield [message]


def rank(message: dict) -> float:
    """0 is the best; a message without a rank comes after those with one."""
    return float("inf") if message.get("rank") is None else message["rank"]


def ratings(message: dict) -> str | None:
    """`quality:4,toxicity:0,...`, each 0 to 4; None if there are none."""
    labels = message.get("labels") or {}
    if "name" in labels:  # the columns of a Parquet file
        labels = {name: {"value": value} for name, value in zip(labels["name"], labels["value"], strict=True)}
    return ",".join(f"{name}:{round(labels[name]['value'] * 4)}" for name in RATINGS if name in labels) or None


def to_chat(thread: list[dict], system: str, labels: bool) -> dict:
    """One sample."""
    turns = []
    for message in thread:
        turn = {"from": ROLES[message["role"]], "value": message["text"]}
        if labels:
            turn["label"] = ratings(message) if message["role"] == "assistant" else None
        turns.append(turn)
    kind = "VALUE_TO_TEXT" if labels else None
    return {"system": system, "conversations": turns, "mask": "User", "type": kind}


def build_parser() -> argparse.ArgumentParser:
    """The recipe's flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", required=True, nargs="+", metavar="PATH", help="public files, or their folder")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="where train and val are written")
    parser.add_argument("--threads", choices=("best", "all"), default="best", help="conversations a tree gives")
    parser.add_argument("--labels", action="store_true", help="condition on the annotators' ratings")
    parser.add_argument("--system", default=SYSTEM, help='system text (default: "%(default)s")')
    parser.add_argument("--lang", metavar="CODE", help="only trees whose first message has this language, such as en")
    parser.add_argument(
        "--validation", type=float, default=0.05, metavar="SHARE", help="trees held out (default: 0.05)"
    )
    parser.add_argument("--seed", type=int, default=1234, help="of the split (default: 1234)")
    parser.add_argument("--on-error", choices=("raise", "skip"), default="raise", help="records that cannot be used")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        problems = Problems(arguments.on_error)
        roots = read_trees(find_files(arguments.input, (".jsonl", ".jsonl.gz", ".parquet")), problems)
        problems.check()
    except MegakdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if problems.count:
        print(f"left out {problems.count} records:\n{problems}")
    roots = [root for root in roots if not root.get("deleted") and arguments.lang in (None, root.get("lang"))]
    best = arguments.threads == "best"
    parts: dict[str, list[dict]] = {"train": [], "val": []}
    held_out = round(arguments.validation * len(roots))
    for number, place in enumerate(permute(range(len(roots)), len(roots), arguments.seed, 1) if roots else []):
        for thread in threads(roots[place], best):
            if best and thread[-1]["role"] == "prompter":
                thread.pop()
            if len(thread) > 1:
                parts["val" if number < held_out else "train"].append(
                    to_chat(thread, arguments.system, arguments.labels)
                )
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        write_records(arguments.output / f"{name}.jsonl", rows)
        print(f"{arguments.output / name}.jsonl: {len(rows):,} conversations")
    return 0


if __name__ == "__main__":
    sys.exit(main())
