"""What every rank of tests/ranks.py needs, imported by the process that they are forked from; it starts no thread."""

import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"

from megakd.megatron_on_cpu import install

install("cpu")

import megakd.training.loop  # noqa: E402, F401

gc.collect()
gc.freeze()  # ranks look through what their calls made, not through a third of a million objects of modules
