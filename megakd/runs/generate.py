"""`megakd generate --checkpoint PATH --prompt TEXT`: complete a prompt greedily with a checkpoint, at any TP x PP."""

import argparse
import sys

from megakd.errors import ConfigError
from megakd.paths import path_argument

CONVERSION_SECONDS = 1800  # how long ranks wait for the one that converts a Hugging Face folder


def main(argv: list[str]) -> None:
    """Run `megakd generate ARGV...` on this rank; rank 0 prints prompt and completion."""
    arguments = build_parser().parse_args(argv)
    from megakd.megatron_on_cpu import install  # torch, after --help has been answered
    from megakd.ranks import Ranks

    with Ranks(arguments.device, collective_seconds=CONVERSION_SECONDS) as ranks:
        install(ranks.device.type)
        from megakd.assembly.models import build_model
        from megakd.config import Parallel, Train
        from megakd.converters.direct import open_checkpoint
        from megakd.data.tokenizers.load import load_tokenizer
        from megakd.models.generation import complete
        from megakd.models.gpt import padded_vocab_size
        from megakd.models.groups import build_groups
        from megakd.ranks import from_rank_0

        if ranks.world_size != arguments.tp * arguments.pp:
            raise ConfigError(
                f"--tp {arguments.tp} x --pp {arguments.pp} need {arguments.tp * arguments.pp} ranks, "
                f"{ranks.world_size} were started",
                hint=f"torchrun --nproc-per-node {arguments.tp * arguments.pp} -m megakd generate ...",
            )
        checkpoint = from_rank_0(lambda: open_checkpoint(arguments.checkpoint, progress=sys.stderr.isatty()))
        if checkpoint.tokenizer_path is None:
            raise ConfigError(f"{checkpoint.path} carries no tokenizer", hint="use a checkpoint that megakd has saved")
        tokenizer = load_tokenizer(checkpoint.tokenizer_path)
        model = checkpoint.model
        ids = tokenizer.encode(arguments.prompt)
        room = model.max_sequence_length - arguments.max_new_tokens
        if not ids:
            raise ConfigError("the prompt has no tokens", hint="--prompt TEXT")
        if len(ids) > room:
            raise ConfigError(
                f"the prompt's {len(ids)} tokens and --max-new-tokens {arguments.max_new_tokens} exceed the model's "
                f"{model.max_sequence_length} positions",
                hint=f"at most --max-new-tokens {max(model.max_sequence_length - len(ids), 0)}, or a shorter prompt",
            )
        groups = build_groups(arguments.tp, arguments.pp, seed=0)
        gpt = build_model(
            model, checkpoint, Parallel(tp=arguments.tp, pp=arguments.pp),
            Train(steps=1, global_batch_size=1, precision=arguments.precision), groups,
            vocab_size=tokenizer.vocab_size, padded_size=padded_vocab_size(model.vocab_size), device=ranks.device,
        )  # fmt: skip
        new = complete(gpt, ids, arguments.max_new_tokens, tokenizer.eos_id, groups, ranks.device)
        if ranks.is_main:
            print(arguments.prompt + tokenizer.decode(ids + new)[len(tokenizer.decode(ids)) :], flush=True)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megakd generate", description="complete a prompt greedily")
    parser.add_argument(
        "--checkpoint", required=True, type=path_argument, help="checkpoint, run or Hugging Face folder"
    )
    parser.add_argument("--prompt", required=True, help="text to go on from")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default: %(default)s")
    parser.add_argument("--tp", type=int, default=1, help="tensor parallel size (default: %(default)s)")
    parser.add_argument("--pp", type=int, default=1, help="pipeline parallel size (default: %(default)s)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32", help="default: %(default)s")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: %(default)s")
    return parser
