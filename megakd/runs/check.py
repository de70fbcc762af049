"""`megakd check`: before a launch, or when something looks wrong.

megakd check CHECKPOINT ...              read all of a checkpoint or a run: what of it is whole
megakd check CONFIG.yaml [key=value ...] what a run needs on --nodes x --gpus-per-node GPUs: memory,
                                         traffic, checkpoint, speed, layouts that fit, the launch
megakd check --env                       what is installed here, its use, what a missing part costs
"""

import argparse
import pathlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from megakd.errors import CheckpointError
from megakd.paths import path_argument
from megakd.progress import progress_bar
from megakd.runs import plan


def main(argv: list[str]) -> int:
    """Run `megakd check ARGV...`; returns 0 if everything is whole, or fits; 1 if not, or if it cannot be told."""
    parser = build_parser()
    arguments = parser.parse_intermixed_args(argv)  # flags may stand between overrides
    words = arguments.words
    is_config = bool(words) and words[0].endswith((".yaml", ".yml"))
    if arguments.env == bool(words):
        parser.error("give CHECKPOINT ..., CONFIG.yaml, or --env")
    if arguments.env:
        from megakd.runs.environment import report

        return report(arguments.json)
    if is_config:
        return plan.plan(arguments, words)
    if arguments.json:
        parser.error("--json belongs to --env and to CONFIG.yaml")
    return max(check(path) for given in words for path in checkpoints_of(path_argument(given)))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megakd check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="WHAT", help="checkpoints, run folders, or a config and overrides")
    parser.add_argument("--env", action="store_true", help="report on this machine and what is installed")
    parser.add_argument("--json", action="store_true", help="that report, or a config's plan, as one line of JSON")
    plan.add_flags(parser)
    return parser


def checkpoints_of(path: pathlib.Path) -> list[pathlib.Path]:
    """A checkpoint folder as it is; of a run folder, every checkpoint that has its name."""
    from megakd.checkpoints.folder import last_checkpoint, step_folders

    return step_folders(path) or [last_checkpoint(path)]


def check(path: pathlib.Path) -> int:
    """Print what of one checkpoint is whole; the exit code."""
    from megakd.checkpoints.folder import read_checkpoint

    try:
        checkpoint = read_checkpoint(path, verify="never")
        files = checkpoint.files
        said = f"{path}: step {checkpoint.step}"
        if checkpoint.run is not None:
            sizes = " x ".join(f"{axis} {size}" for axis, size in (checkpoint.layout or {}).items())
            said += f" of run {checkpoint.run}, saved at {sizes}"
        if files.digests is None:
            print(f"{said}: {len(files.sizes)} files of the right size; without digests, no more can be told")
            return 1
        wrong = list(damage(checkpoint))
    except CheckpointError as error:
        print(f"{path}: damaged\n  {error.args[0]}")
        return 1
    total = f"{len(files.sizes)} files, {sum(files.sizes.values()):,} bytes"
    print("\n  ".join([f"{said}: {total}, {'damaged' if wrong else 'whole'}", *wrong]))
    return int(bool(wrong))


def damage(checkpoint) -> Iterator[str]:
    """What is wrong with the files of a checkpoint, one line for each."""
    from megakd.digests import CHUNK_BYTES, READERS, digest_file

    files = checkpoint.files

    def look(name: str) -> str | None:
        known = files.digests[name]
        try:
            found = digest_file(files.folder / name)
        except OSError as error:
            return f"{name}: cannot be read: {error.strerror}"
        wrong = [number for number in range(known.count) if found.of(number) != known.of(number)]
        if not wrong and found.size_bytes == known.size_bytes:
            return None
        starts = ", ".join(f"{number * CHUNK_BYTES:,}" for number in wrong[:8])
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        return f"{name}: {len(wrong)} of {known.count} chunks damaged, those at byte {starts}{more}"

    with ThreadPoolExecutor(READERS) as threads:
        yield from filter(None, progress(threads.map(look, files.digests), len(files.digests)))


def progress(lines: Iterator, total: int) -> Iterator:
    """The same, with a bar."""
    with progress_bar(total, "checking") as bar:
        for line in lines:
            yield line
            bar.update()
