"""`megakd prune CONFIG.yaml [key=value ...]`: a student cut out of its teacher, to be distilled.

    torchrun --nproc-per-node N -m megakd prune CONFIG.yaml [key=value ...]
    megakd prune CONFIG.yaml [key=value ...] --dry-run

What matters least of `teacher.checkpoint` over the samples of `data.train` is left out, as the prune section asks;
`student.checkpoint` is the folder that is written. `megakd train` with the same config then distils it.
"""

import argparse
import os

from megakd.config import Config
from megakd.config.checks import check_layout
from megakd.runs.start import start_run


def main(argv: list[str]) -> None:
    """Run `megakd prune ARGV...` on this rank."""
    flags, rest = build_parser().parse_known_args(argv)
    if flags.dry_run:
        return dry_run(Config.from_arguments(rest))
    with start_run(rest, check=check_prune) as (config, ranks):
        from megakd.megatron_on_cpu import install

        install(ranks.device.type)
        from megakd.pruning.prune import prune

        shown = prune(config, ranks, " ".join(["megakd prune", *argv]))
        if ranks.is_main:
            print(f"{config.student.checkpoint}, cut out of {config.teacher.checkpoint}:\n{shown}", flush=True)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megakd prune", add_help=False, allow_abbrev=False)
    parser.add_argument("--dry-run", action="store_true")
    return parser


def check_prune(config: Config, world_size: int) -> None:
    """What the verb needs, and the layout, whatever the batch: there is none."""
    from megakd.pruning.checks import as_teacher, check_config

    check_config(config)
    check_layout(as_teacher(config), world_size)


def dry_run(config: Config) -> None:
    """The table of sizes; no ranks meet and no weights are read."""
    from megakd.converters.direct import section_of
    from megakd.pruning.checks import check_config, check_sizes
    from megakd.pruning.sizes import table
    from megakd.ranks import read_launch

    check_config(config)
    model = section_of(config.teacher.checkpoint)
    check_sizes(config, model)
    if read_launch(os.environ).rank == 0:
        print(table(model, config.prune), flush=True)
