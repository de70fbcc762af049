"""Ends the ranks that tests/ranks.py started, and hides from the tests the launcher that they may run under."""

import os

from tests.ranks import close_pools


def pytest_configure():
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "PMI_"))]:
        del os.environ[name]


def pytest_sessionfinish():
    close_pools()
