"""Progress bars and log lines that share one stderr.

In a terminal a bar stays on the last line and log lines pass above it. In a file nothing can be drawn over, so there a
bar is a line now and then, and a short task none at all. The numbers that matter come first: what is cut off at the
edge of a terminal is at the end.
"""

import logging
import sys
import time

from tqdm import tqdm

FORMAT = "{desc}{n_fmt}/{total_fmt} |{bar:10}| {remaining} left{postfix}"
TERMINAL_SECONDS = 0.5
FILE_SECONDS = 30.0


def progress_bar(total: int, what: str = "", *, unit: str = "", start: int = 0, shown: bool = True):
    """A bar to be advanced with `update(n)`, closed with `close()` or as a `with` block, and gone after that.

    Args:
        total: of what is counted; `unit="B"` counts bytes.
        what: is going on; "" where the log says it.
        start: how much was done before.
        shown: False draws nothing.
    """
    if shown and not sys.stderr.isatty():
        return LinesOfProgress(total, what, start, unit)
    return tqdm(
        total=total, initial=start, desc=what or None, unit=unit, unit_scale=unit == "B", bar_format=FORMAT,
        mininterval=TERMINAL_SECONDS, dynamic_ncols=True, leave=False, disable=not shown,
    )  # fmt: skip


class LinesOfProgress:
    """What a bar is in a file: a line at most every FILE_SECONDS."""

    disable = False

    def __init__(self, total: int, what: str, start: int, unit: str):
        self.total, self.n, self.start, self.unit = total, start, start, unit
        self.what = f"{what}: " if what else ""
        self.postfix = ""
        self.began = self.written = time.monotonic()

    def __enter__(self) -> "LinesOfProgress":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        self.postfix = text

    def update(self, n: int = 1) -> None:
        self.n += n
        now = time.monotonic()
        if now - self.written >= FILE_SECONDS:
            self.written = now
            line = tqdm.format_meter(
                self.n, self.total, now - self.began, initial=self.start, prefix=self.what, unit=self.unit,
                unit_scale=self.unit == "B", bar_format=FORMAT, postfix=self.postfix, ascii=True,
            )  # fmt: skip
            sys.stderr.write(line + "\n")

    def close(self) -> None:
        sys.stderr.flush()


class LogHandler(logging.StreamHandler):
    """Writes log lines to stderr, above the bars of a terminal.

    In a file it takes no lock of tqdm's, which a process that was forked while another thread held it would wait for.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if not self.stream.isatty():
            return super().emit(record)
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)
