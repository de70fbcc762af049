# On a fresh clone, `make quickstart` and `make test` are all there is to type: each sets up .venv first.
#
# The versions are those of constraints.txt. Plain pip is used, with whatever index the machine is set up for. On Linux
# the public torch wheel carries CUDA; README says how to have the CPU wheel (a tenth of the size) put in instead.

PYTHON ?= python3
SEED   ?= 1
ARGS   ?=

PY := $(CURDIR)/.venv/bin/python

.PHONY: help quickstart test check format bench
.DEFAULT_GOAL := help

help: ## this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "make %-11s %s\n", $$1, $$2 }'

quickstart: .venv/.installed ## train a teacher, distil a student at TP 2, compare, in minutes on a CPU (SEED=1)
	PYTHON=$(PY) bash examples/quickstart/run.sh $(SEED)

test: .venv/.installed ## all tests (ARGS="-k loss -x" goes to pytest)
	OMP_NUM_THREADS=1 TORCH_COMPILE_DISABLE=1 $(PY) -m pytest $(ARGS)

check: .venv/.installed ## formatting, lint, import layers
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m pytest -q tests/test_layers.py

format: .venv/.installed ## formatting and what lint can put right
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: .venv/.installed ## time and memory of the loss beside its peers
	$(PY) tools/benchmarks/loss.py $(ARGS)

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check --no-input -c constraints.txt -e '.[dev]'
	touch $@
