"""`megakd generate`: a model writes, at any layout: one prompt's answer on the screen, or a file of completions.

    megakd generate --checkpoint PATH --prompt TEXT
    megakd generate --checkpoint PATH --input PROMPTS --output COMPLETIONS.jsonl
    torchrun --nproc-per-node N -m megakd generate --tp T ...

Ranks beyond --tp x --pp are more models, which share the prompts. A launch that was killed goes on when the same
command is given again. `data.train: COMPLETIONS.jsonl` trains on the very tokens that were written.
"""

import argparse
import os

from megakd.errors import ConfigError
from megakd.paths import path_argument, path_text
from megakd.runs.data_flags import add_format, data_section
from megakd.runs.facts import launch_facts

CONVERSION_SECONDS = 1800  # how long ranks wait for the one that converts a Hugging Face folder, or the slowest model


def main(argv: list[str]) -> None:
    """Run `megakd generate ARGV...` on this rank; rank 0 prints, the first rank of every model writes."""
    arguments = build_parser().parse_args(argv)
    check(arguments)
    data = data_section(arguments, arguments.input, 1) if arguments.input else None
    from megakd.megatron_on_cpu import install  # torch, after --help has been answered
    from megakd.ranks import Ranks

    facts = {key: str(value) for key, value in vars(arguments).items()} | launch_facts()
    with Ranks(arguments.device, collective_seconds=CONVERSION_SECONDS, facts=facts) as ranks:
        install(ranks.device.type)
        from megakd.generation.generate import complete, write_file

        options = build_options(arguments)
        if data is not None:
            write_file(
                options, data, arguments.output, ranks,
                shard=arguments.shard, limit=arguments.limit, upload=arguments.upload,
            )  # fmt: skip
            return
        if ranks.world_size != arguments.tp * arguments.pp:
            raise ConfigError(
                f"--tp {arguments.tp} x --pp {arguments.pp} are {arguments.tp * arguments.pp} ranks, "
                f"{ranks.world_size} were started for one prompt",
                hint=f"torchrun --nproc-per-node {arguments.tp * arguments.pp} -m megakd generate ...",
            )
        texts = complete(options, arguments.prompt, ranks, raw=arguments.raw)
        if ranks.is_main:
            print("\n---\n".join(texts), flush=True)


def build_options(arguments: argparse.Namespace):
    """The flags as `megakd.generation.generate.Options`."""
    from megakd.generation.generate import Options
    from megakd.kernels.next_tokens import Choice

    return Options(
        checkpoint=arguments.checkpoint,
        choice=Choice(arguments.temperature, arguments.top_k, arguments.top_p, arguments.min_p),
        max_new_tokens=arguments.max_new_tokens,
        completions=arguments.n,
        stop_texts=tuple(arguments.stop),
        stop_tokens=tuple(arguments.stop_token),
        ignore_eos=arguments.ignore_eos,
        seed=arguments.seed,
        slots=arguments.batch_size,
        tp=arguments.tp,
        pp=arguments.pp,
        precision=arguments.precision,
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megakd generate", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint", required=True, type=path_argument, help="checkpoint, run or Hugging Face folder"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="to answer; by the chat template where the checkpoint has one")
    what.add_argument("--input", type=path_text, metavar="PATH", help="prompts, in any form that data.train reads")
    parser.add_argument("--raw", action="store_true", help="with --prompt: go on from the text, without chat template")
    parser.add_argument("--output", type=path_argument, metavar="FILE.jsonl", help="with --input: where to write")
    parser.add_argument("--upload", metavar="ADDRESS", help="send OUTPUT there as well: hf://datasets/..., s3://...")
    add = parser.add_argument_group("what is written").add_argument
    add("--max-new-tokens", type=int, default=64, metavar="N", help="of a completion (default: %(default)s)")
    add("--n", type=int, default=1, metavar="N", help="completions of each prompt (default: %(default)s)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0: the most likely token (default: %(default)s)")
    add("--top-k", type=int, metavar="K", help="draw from the K most likely tokens")
    add("--top-p", type=float, metavar="P", help="draw from the most likely tokens that together have this probability")
    add(
        "--min-p", type=float, metavar="P", help="draw from tokens with this share of the most likely one's probability"
    )
    add("--seed", type=int, default=1234, metavar="N", help="of draws (default: %(default)s)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    add("--stop-token", action="append", default=[], metavar="TOKEN", help="end at this token or id; may be repeated")
    add("--ignore-eos", action="store_true", help="go on behind the tokenizer's end of text")
    add = parser.add_argument_group("how").add_argument
    add("--batch-size", type=int, default=16, metavar="N", help="sequences at once in a model (default: %(default)s)")
    add("--tp", type=int, default=1, help="tensor parallel size (default: %(default)s)")
    add("--pp", type=int, default=1, help="pipeline parallel size (default: %(default)s)")
    add("--precision", choices=("bf16", "fp32"), help="default: bf16 on CUDA, fp32 on a CPU")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: %(default)s")
    add("--shard", type=shard, default=(0, 1), metavar="I/N", help="of the prompts, the I-th (from 0) of N shares")
    add("--limit", type=int, metavar="N", help="use the first N records of the input")
    add(
        "--on-error", choices=("raise", "skip"), default="raise", help="records that cannot be used: stop, or leave out"
    )
    records = parser.add_argument_group("records of --input")
    add_format(records)
    return parser


def shard(text: str) -> tuple[int, int]:
    """`I/N` as (I, N)."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text}: expected I/N with I from 0 to N - 1, as in 0/4")
    return int(index), int(count)


def check(arguments: argparse.Namespace) -> None:
    """Raises ConfigError where a flag's value makes no sense, before anything is loaded."""
    for name, least in (("max_new_tokens", 1), ("n", 1), ("batch_size", 1), ("tp", 1), ("pp", 1), ("top_k", 1),
                        ("limit", 1)):  # fmt: skip
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: expected {least} or more")
    if not 0 <= arguments.temperature < float("inf"):
        raise ConfigError(f"--temperature {arguments.temperature}: expected 0 (the most likely token) or more")
    for name in ("top_p", "min_p"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value <= 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: expected more than 0 and at most 1")
    filters = {"--top-k": arguments.top_k, "--top-p": arguments.top_p, "--min-p": arguments.min_p}
    drawing = [flag for flag, value in filters.items() if value is not None]
    if arguments.temperature == 0 and drawing:
        raise ConfigError(f"{' '.join(drawing)} without effect at --temperature 0", hint="--temperature 1")
    if arguments.temperature == 0 and arguments.n > 1:
        raise ConfigError(f"--n {arguments.n} equal completions at --temperature 0", hint="--temperature 1")
    defaults = build_parser().parse_args(["--checkpoint", ".", "--prompt", ""])
    records = ("format", "column", "template", "chat_template", "chat_argument", "bos")
    only_input = ("upload", "shard", "limit", "on_error", *records)
    for name in ("raw",) if arguments.input else only_input:
        if getattr(arguments, name) != getattr(defaults, name):
            other = "--input" if arguments.input else "--prompt"
            raise ConfigError(f"--{name.replace('_', '-')} has no effect with {other}", hint="leave it out")
    if arguments.input and arguments.output is None:
        raise ConfigError("--input without --output", hint="--output COMPLETIONS.jsonl")
    if arguments.prompt is not None and arguments.output is not None:
        raise ConfigError("--output without --input", hint="--prompt prints; --input PROMPTS.jsonl reads many")
    if arguments.output is not None and os.path.splitext(arguments.output)[1] not in (".jsonl", ".ndjson"):
        raise ConfigError(f"--output {arguments.output}: expected a name that ends with .jsonl")
