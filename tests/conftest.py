"""Ends the ranks that tests/ranks.py started."""

from tests.ranks import close_pools


def pytest_sessionfinish():
    close_pools()
