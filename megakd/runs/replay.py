"""`megakd replay RECORD CONFIG.yaml [key=value ...]`: compute a step again and say what differs first.

RECORD is a folder that run.record_steps has made. The step is computed with this launch's
layout, device and versions, from the weights that the recorded one began from, and compared in
the order of computation: ids, labels, the teacher's targets, the student's loss of every token,
the gradient's norm of every parameter. Nothing is trained. What was computed is kept in
`replays` in run.dir, as a record of its own: two records are compared without computing
anything by `megakd replay RECORD RECORD`.

The exit code is 1 when something differs by more than is allowed; by default that depends on
the coarser precision of the two.
"""

import argparse
import os
import pathlib
import sys

from megakd.errors import ConfigError
from megakd.paths import path_argument

TOLERANCES = {
    "targets": "log-probabilities of the teacher's entries (nats; of a value x, times max(1, |x|))",
    "losses": "losses of a token, likewise; a tenth of it for their mean",
    "gradients": "a parameter's gradient norm, relative",
}


def main(argv: list[str]) -> int:
    """Run `megakd replay ARGV...` on this rank; returns the exit code."""
    arguments = build_parser().parse_intermixed_args(argv)
    flags = {name: value for name in TOLERANCES if (value := getattr(arguments, name)) is not None}
    if os.path.isdir(arguments.config):
        text, differs = compare_two(arguments.record, pathlib.Path(arguments.config), arguments.overrides, flags)
        print(text)
        return int(differs)
    from megakd.megatron_on_cpu import install
    from megakd.runs.start import start_run

    with start_run([arguments.config, *arguments.overrides]) as (config, ranks):
        install(ranks.device.type)
        from megakd.training.replay import replay

        text, differs = replay(arguments.record, config, ranks, flags)
        if ranks.is_main:
            print(text)
            sys.stdout.flush()  # torchrun ends the others when one has ended with a code
    return int(differs)


def compare_two(a: pathlib.Path, b: pathlib.Path, overrides: list[str], flags: dict) -> tuple[str, bool]:
    """Two records, without a config."""
    if overrides:
        raise ConfigError(
            f"{b} is a recorded step: two records are compared as they are, without {' '.join(overrides)}",
            hint="give a CONFIG.yaml to compute the step again",
        )
    from megakd.steps.comparison import compare_records
    from megakd.steps.folder import read_record

    return compare_records(read_record(a), read_record(b), flags)


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="megakd replay", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("record", type=path_argument, metavar="RECORD", help="RUN/steps/step_00000001")
    parser.add_argument("config", metavar="CONFIG.yaml", help="of the recorded run; or another RECORD")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="parallel.tp=1 run.device=cpu ...")
    for name, text in TOLERANCES.items():
        parser.add_argument(f"--{name}", type=positive, metavar="TOLERANCE", help=f"allowed of {text}")
    return parser
