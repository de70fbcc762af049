"""`megakd report RUN [RUN ...]`: one page of HTML about runs, for a browser without a network too.

Curves over steps, tokens and seconds, final and best values, the time of a step's phases, and the
settings in which the runs differ. Reads the run folders alone; a run may still be going on.
"""

import argparse
import datetime
import pathlib

from megakd.errors import ReportError
from megakd.paths import path_argument


def main(argv: list[str]) -> int:
    """Run `megakd report ARGV...`; returns the exit code 0, or raises ReportError."""
    arguments = build_parser().parse_args(argv)
    from megakd.publish import publish_text
    from megakd.reporting.markup import printable
    from megakd.reporting.page import page
    from megakd.reporting.runs import read_runs

    runs = read_runs(arguments.runs)
    try:
        publish_text(arguments.output, page(runs, datetime.datetime.now()))
    except OSError as error:
        raise ReportError(
            f"{arguments.output} cannot be written: {error.strerror}",
            hint="--output names a file in a folder that is there",
        ) from error
    said = [f"{run.name}: {note}" for run in runs for note in run.notes]
    said.append(f"{arguments.output}: {', '.join(run.name for run in runs)}; open it in a browser")
    print(printable("\n".join(said)))
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="megakd report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=path_argument, metavar="RUN", help="run folders: what run.dir named")
    parser.add_argument(
        "--output", type=path_argument, default=pathlib.Path("report.html"), metavar="FILE.html",
        help="what to write; a file of that name is replaced (default: %(default)s)",
    )  # fmt: skip
    return parser
