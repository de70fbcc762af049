"""What every rank of tests/ranks.py needs, imported by the process that they are forked from; it starts no thread."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

from megakd.megatron_on_cpu import install

install("cpu")

import megakd.training.loop  # noqa: E402, F401
