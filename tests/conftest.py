"""Ends the ranks that tests/ranks.py started; hides the launcher that the tests may run under."""

import importlib.metadata
import os
import sys

from tests.ranks import close_pools


def pytest_configure():
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "PMI_"))]:
        del os.environ[name]
    # The tests start hundreds of processes; compiling megakd anew was a second of each.
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_collection_modifyitems(items):
    """Files with slow tests first, so that of several workers none is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_report_header():
    return "megatron-core " + importlib.metadata.version("megatron-core")


def pytest_sessionfinish():
    close_pools()
