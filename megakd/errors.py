"""The errors a user meets: each says what, where and which values, and ends with a hint about what to change."""


class MegakdError(Exception):
    """A mistake or a failure that is explained to the user without a traceback.

    Args:
        message: what went wrong, where, and the values seen and expected.
        hint: what to change; printed on a line of its own.
    """

    def __init__(self, message: str, *, hint: str | None = None):
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = super().__str__()
        return message if self.hint is None else f"{message}\nhint: {self.hint}"


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
