"""`megakd cache stat|verify|merge|import|export`: tools for logit caches, without ranks or a GPU.

megakd cache CONFIG.yaml [key=value ...]           record (see `megakd train --help` for the keys)
megakd cache stat CACHE [--plot FILE.png]          samples, tokens, bytes a token, mass kept
megakd cache verify CACHE                          every digest, checksum and row
megakd cache merge --output CACHE CACHE CACHE ...  recordings of one teacher as one
megakd cache import / export (see their --help)    NeMo-Aligner's JSONL chunks
"""

import argparse
import collections

from megakd.errors import CacheError
from megakd.paths import path_argument, path_text


def main(argv: list[str]) -> int:
    """Run `megakd cache ARGV...`; returns the exit code 0, or raises CacheError."""
    arguments = build_parser().parse_args(argv or ["--help"])
    return arguments.run(arguments)


def build_parser() -> argparse.ArgumentParser:
    """The flags of every tool."""
    parser = argparse.ArgumentParser(
        prog="megakd cache", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tools = parser.add_subparsers(required=True, metavar="TOOL")
    stat = tools.add_parser("stat", help="what a cache holds")
    stat.add_argument("cache", type=path_argument)
    stat.add_argument("--plot", type=path_argument, metavar="FILE.png", help="write the mass kept as a picture")
    stat.add_argument("--rows", type=int, default=2000, help="samples to decode for the mass (default: %(default)s)")
    stat.set_defaults(run=run_stat)
    verify = tools.add_parser("verify", help="check every digest, checksum and row")
    verify.add_argument("cache", type=path_argument)
    verify.set_defaults(run=run_verify)
    merge = tools.add_parser("merge", help="join recordings of one teacher; the inputs stay as they are")
    merge.add_argument("--output", required=True, type=path_argument, metavar="CACHE", help="folder to make")
    merge.add_argument(
        "--same-teacher", action="store_true", help="imported caches, which do not know their teacher, have one"
    )
    merge.add_argument("caches", nargs="+", type=path_argument, metavar="CACHE")
    merge.set_defaults(run=run_merge)
    add_import(tools)
    add_export(tools)
    return parser


TOOLS = ("stat", "verify", "merge", "import", "export")


def add_import(tools) -> None:
    """The flags of `megakd cache import`."""
    parser = tools.add_parser("import", help="NeMo-Aligner's JSONL chunks into a cache and a token file")
    parser.add_argument(
        "--input", required=True, type=path_text, metavar="PATH_CHUNK_ID.jsonl", help="CHUNK_ID stands for 0, 1, 2, ..."
    )
    parser.add_argument("--tokenizer", required=True, type=path_argument, help="of the ids: a file, or a checkpoint")
    parser.add_argument("--vocab-size", type=int, metavar="V", help="real vocabulary (default: the tokenizer's)")
    parser.add_argument("--output", required=True, type=path_argument, metavar="CACHE", help="folder to make")
    parser.add_argument("--data", required=True, type=path_argument, metavar="PREFIX", help="token file to write")
    parser.add_argument("--codec", choices=("fp32", "fp16", "q8"), default="fp16", help="default: %(default)s")
    parser.add_argument("--shard-samples", type=int, default=256, metavar="N", help="default: %(default)s")
    parser.set_defaults(run=run_import)


def add_export(tools) -> None:
    """The flags of `megakd cache export`."""
    parser = tools.add_parser("export", help="a cache and its token file into NeMo-Aligner's JSONL chunks")
    parser.add_argument("cache", type=path_argument)
    parser.add_argument("--data", required=True, type=path_argument, metavar="PREFIX", help="token file of the samples")
    parser.add_argument("--sequence-length", type=int, metavar="S", help="as recorded (default: the cache's)")
    parser.add_argument("--output", required=True, type=path_text, metavar="PATH_CHUNK_ID.jsonl")
    parser.add_argument("--chunks", type=int, default=1, metavar="N", help="files to write (default: %(default)s)")
    parser.set_defaults(run=run_export)


def run_import(arguments: argparse.Namespace) -> int:
    from megakd.runs import cache_aligner

    return cache_aligner.run_import(arguments)


def run_export(arguments: argparse.Namespace) -> int:
    from megakd.runs import cache_aligner

    return cache_aligner.run_export(arguments)


def run_stat(arguments: argparse.Namespace) -> int:
    from megakd.cache.stat import describe, measure, plot

    if arguments.rows < 1:
        raise CacheError(f"--rows is {arguments.rows}", hint="decode one sample or more; the default is 2000")
    stats = measure(arguments.cache, arguments.rows)
    print(describe(stats))
    if arguments.plot:
        plot(stats, arguments.plot)
        print(f"plot          {arguments.plot}")
    return 0


def run_verify(arguments: argparse.Namespace) -> int:
    from megakd.cache import read_header
    from megakd.cache.verify import verify
    from megakd.progress import progress_bar

    total = sum(shard.bytes for shard in read_header(arguments.cache).shards)
    with progress_bar(total, "verifying", unit="B") as bar:
        header = verify(arguments.cache, lambda shard: bar.update(shard.bytes))
    held = f"{header.rows:,} samples and {header.tokens:,} tokens in {len(header.shards)} shards"
    print(f"{arguments.cache}: {held}, all whole")
    return 0


def run_merge(arguments: argparse.Namespace) -> int:
    from megakd.cache.merge import merge

    inputs = [path.resolve() for path in arguments.caches]
    if arguments.output.resolve() in inputs:
        raise CacheError(f"{arguments.output} is both input and output", hint="merge into a folder of its own")
    if twice := [path for path, count in collections.Counter(inputs).items() if count > 1]:
        raise CacheError(f"{twice[0]} is given more than once", hint="name every cache once")
    inputs = [str(path) for path in arguments.caches]
    command = " ".join(["megakd cache merge --output", str(arguments.output), *inputs])
    header, duplicates = merge(arguments.output, arguments.caches, command, same_teacher=arguments.same_teacher)
    twice = f", {duplicates} of them recorded more than once" if duplicates else ""
    print(f"{arguments.output}: {header.rows:,} samples and {header.tokens:,} tokens from {len(inputs)} caches{twice}")
    return 0
