"""Whether EleutherAI's lm-eval is there, without importing it."""

import importlib.util

from megakd.errors import ConfigError


def check_installed(wanted_by: str) -> None:
    """Raises ConfigError where it is not.

    Args:
        wanted_by: the flag or key that the user has given.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"{wanted_by} needs EleutherAI's lm-eval", hint='pip install "megakd[eval]"')
