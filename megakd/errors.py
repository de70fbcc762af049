"""The errors a user meets: each says what, where and which values, and ends with a hint about what to change."""

LONGEST_LINE, MOST_LINES = 1000, 200


class MegakdError(Exception):
    """A mistake or a failure that is explained to the user without a traceback.

    Args:
        message: what went wrong, where, and the values seen and expected. What it quotes of files and of other
            libraries' errors may be of any length and hold anything; see `readable`.
        hint: what to change; printed on a line of its own.
    """

    def __init__(self, message: str, *, hint: str | None = None):
        super().__init__(readable(message))
        self.hint = None if hint is None else readable(hint)

    def __str__(self) -> str:
        message = super().__str__()
        return message if self.hint is None else f"{message}\nhint: {self.hint}"


def readable(text: str) -> str:
    """A text of at most MOST_LINES lines of LONGEST_LINE characters, without what would steer a terminal."""
    lines = text.split("\n")
    if len(lines) > MOST_LINES:
        lines = [*lines[:150], f"[... {len(lines) - 190:,} lines ...]", *lines[-40:]]
    return "\n".join(map(_readable_line, lines))


def _readable_line(line: str) -> str:
    if not line.isprintable():
        line = "".join(c if c.isprintable() or c in "\t\u00a0" else repr(c)[1:-1] for c in line)
    if len(line) > LONGEST_LINE:
        line = f"{line[:700]} [... {len(line) - 900:,} characters ...] {line[-200:]}"
    return line


class ConfigError(MegakdError):
    """A run's configuration, or its fit to the machine it was started on, is wrong."""


class DataError(MegakdError):
    """Training data or a tokenizer is missing, damaged, or does not belong together."""


class CheckpointError(MegakdError):
    """A checkpoint is missing, damaged, incomplete, or describes another model."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint does not hold what was saved in it."""


class CacheError(MegakdError):
    """A logit cache is missing, damaged, or was recorded for something else."""


class TrainingError(MegakdError):
    """A run had to stop: a loss that is not finite, a teacher that knows nothing, a rank that failed."""


class ReportError(MegakdError):
    """A folder that is no run's, or a report that cannot be written."""


class StepError(MegakdError):
    """A recorded step is missing, damaged, or of another run than the one it is compared with."""
