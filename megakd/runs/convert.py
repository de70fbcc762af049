"""`megakd convert`: Hugging Face folders and .nemo files to checkpoints and back, with equal logits.

    megakd convert --from HF_FOLDER --to CHECKPOINT
    megakd convert --from MODEL.nemo --to CHECKPOINT
    megakd convert --from CHECKPOINT_OR_RUN --to HF_FOLDER
    megakd convert --from CHECKPOINT_OR_RUN --to MODEL.nemo --format nemo
    megakd convert --list

One process, no GPU, one tensor in memory at a time. Afterwards the same prompts go through both
models, and a conversion whose logits differ is thrown away.
"""

import argparse
import json
import os
import pathlib
import sys
import time

from megakd.paths import path_argument
from megakd.processes import check_one_process

DEFAULT_FORMAT = {"hf": "megatron", "nemo": "megatron", "megatron": "hf"}


def main(argv: list[str]) -> int:
    """Run `megakd convert ARGV...`; returns the exit code 0, or raises CheckpointError."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.list:
        print(format_families())
        return 0
    if arguments.source is None or arguments.destination is None:
        parser.error("--from and --to are needed (or --list)")
    from megakd.converters.convert import Options, convert, format_of

    check_one_process("convert", os.environ)
    target_format = arguments.format or DEFAULT_FORMAT[format_of(arguments.source)]
    options = Options(
        verify=not arguments.no_verify,
        tp=arguments.tp,
        family=arguments.family,
        max_shard_bytes=int(arguments.max_shard_gb * 1e9),
        overwrite=arguments.overwrite,
        progress=sys.stderr.isatty() if arguments.progress is None else arguments.progress,
    )
    started = time.monotonic()
    record = convert(arguments.source, arguments.destination, target_format, options)
    print(format_result(arguments.destination, record, time.monotonic() - started))
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megakd convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    path = path_argument
    parser.add_argument("--from", dest="source", type=path, metavar="SRC", help="a folder; what it is, is seen from it")
    parser.add_argument("--to", dest="destination", type=path, metavar="DST", help="what to write; must not exist")
    parser.add_argument(
        "--format", choices=("megatron", "hf", "nemo"), help="of DST (default: megatron; hf from megatron)"
    )
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="tensor parallel ranks of the check")
    parser.add_argument("--no-verify", action="store_true", help="do not compare logits; DST records it")
    parser.add_argument("--family", metavar="NAME", help="Hugging Face model_type of a model that was not one before")
    parser.add_argument(
        "--max-shard-gb", type=float, default=5.0, metavar="GB", help="size of one safetensors file (default: 5)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, help="bars (default: on a terminal)")
    parser.add_argument("--list", action="store_true", help="the model families and what of them is refused")
    return parser


def format_families() -> str:
    from megakd.converters.families import FAMILIES, REFUSED

    lines = ["model_type     architecture              written without a Hugging Face origin; refused"]
    for name, family in sorted(FAMILIES.items()):
        written = "yes" if family.config else "no"
        lines.append(f"{name:<13}  {family.architecture:<24}  {written:<3}  {family.refused or '-'}")
    for name, (architecture, reason) in sorted(REFUSED.items()):
        lines.append(f"{name:<13}  {architecture:<24}  -    all of it: {reason}")
    lines.append(
        "nemo           megatron_gpt              yes  alibi and its like, normformer, post-LN, experts, interleaved"
    )
    return "\n".join(lines)


def format_result(destination: pathlib.Path, record: dict, seconds: float) -> str:
    verified = record["verified"]
    if isinstance(verified, str):
        return f"{destination}: {record['model_type']}, {verified}, {seconds:.0f} s\n{json.dumps(record)}"
    worst = max(verified["differences"])
    return (
        f"{destination}: {record['model_type']}, {seconds:.0f} s\n"
        f"verified: largest difference of a logit {worst:.1e}, allowed {verified['bound']:.1e} "
        f"(standard deviation {verified['logit_std']:.2f}, TP {verified['tp']})"
    )
