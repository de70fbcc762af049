"""Data and a teacher that has learnt something from them, anew for every file of tests."""

import pytest

from tests.ranks import run_ranks
from tests.training import runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    runs.prepare(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(folder, tmp_path_factory):
    """A run folder with a teacher that has learnt something, trained on two data-parallel ranks."""
    run_dir = tmp_path_factory.mktemp("teacher")
    config = runs.values(
        folder,
        run_dir,
        student__model__hidden_size=48,
        train__steps=60,
        eval__every_steps=20,
        checkpoint__every_steps=20,
        log__tensorboard=True,
    )
    assert run_ranks(2, runs.train, config) == [None, None]
    return run_dir
