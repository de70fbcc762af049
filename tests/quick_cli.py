"""megakd's command line, for programs of tests/forked.py: the processes that it spawns (an export, a comparison of
logits) are forked from the server that it was forked from, and need not import for seven seconds each."""

import multiprocessing
import multiprocessing.forkserver
import os
import types

from tests.ranks import forkserver


def main(arguments):
    import megakd.cli

    begin_quickly()
    return megakd.cli.main(arguments)


def begin_quickly():
    multiprocessing.forkserver._forkserver.ensure_running = lambda: None  # it is: this process was forked from it
    multiprocessing.get_context = lambda method: types.SimpleNamespace(Pipe=multiprocessing.Pipe, Process=process)


def process(target, args, **options):
    return forkserver_context.Process(target=begin, args=(dict(os.environ), target, args), **options)


forkserver_context = forkserver()


def begin(environment, target, args):
    from megakd.training import export

    begin_quickly()
    os.environ.update(environment)
    export.follow_parent = lambda: None  # the kernel's parent is the server, and ends with the tests
    target(*args)
