# On a fresh clone, `make quickstart` and `make test` are all there is to type: each sets up .venv first.
#
# The versions are those of constraints/ for the Python at hand (PYTHON=python3.12 takes another). Plain pip is used, with
# whatever index the machine is set up for. On Linux the public torch wheel carries CUDA; README says how to have the CPU
# wheel (a tenth of the size) put in instead.

PYTHON ?= python3
SEED   ?= 1
ARGS   ?=
VERSION ?= 0.19.2
# Test processes beside each other; most tests use one core, some start up to four ranks. 0: none but pytest's own
# (for --pdb and -s). A test file stays on one worker.
WORKERS ?= 2

PY := $(CURDIR)/.venv/bin/python
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
CONSTRAINTS := constraints/python$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt

.PHONY: help quickstart test test-nightly test-megatron test-slurm test-ft-launcher check format bench
.DEFAULT_GOAL := help

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "make %-14s %s\n", $$1, $$2 }'

quickstart: .venv/.installed ## train a teacher, distil a student at TP 2, compare, in minutes on a CPU (SEED=1)
	PYTHON=$(PY) bash examples/quickstart/run.sh $(SEED)

test: .venv/.installed ## all tests (ARGS="-k loss -x" goes to pytest)
	OMP_NUM_THREADS=1 TORCH_COMPILE_DISABLE=1 $(PY) -m pytest $(PARALLEL) $(ARGS)

test-nightly: .venv/.installed ## the tests on eight ranks, which take minutes
	OMP_NUM_THREADS=1 TORCH_COMPILE_DISABLE=1 $(PY) -m pytest -m nightly $(ARGS)

# The wheel is for Python 3.12; what is used of it is plain Python, and the torch at hand goes with it. Its compiled helpers
# (data sets, not used here) and its CUDA code are not tried this way.
MEGATRON := build/megatron-core-$(VERSION)
MEGATRON_TESTS ?= tests/test_megatron_on_cpu.py tests/training/test_step.py tests/training/test_curves.py \
	tests/training/test_axes.py tests/training/test_fsdp.py tests/training/test_routing.py \
	tests/checkpoints/test_writer.py tests/checkpoints/test_torch_dist.py tests/checkpoints/test_buckets.py

test-megatron: .venv/.installed $(MEGATRON) ## the tests that pin its results, on another Megatron-Core (VERSION=0.19.2)
	PYTHONPATH=$(MEGATRON) OMP_NUM_THREADS=1 TORCH_COMPILE_DISABLE=1 $(PY) -m pytest $(PARALLEL) $(MEGATRON_TESTS) $(ARGS)

build/megatron-core-%: | .venv/.installed
	rm -rf $@.wheel $@.part
	$(PY) -m pip download --quiet --no-deps --no-input --python-version 3.12 --platform manylinux_2_28_x86_64 \
		--only-binary=:all: --dest $@.wheel megatron-core==$*
	$(PY) -m zipfile -e $@.wheel/*.whl $@.part
	$(PY) -W ignore -m compileall -q $@.part
	rm -rf $@.wheel && mv $@.part $@

test-slurm: .venv/.installed ## job scripts on a real Slurm of two nodes (root, slurm-wlm, munge; skipped without)
	OMP_NUM_THREADS=1 TORCH_COMPILE_DISABLE=1 $(PY) -m pytest tests/slurm -m slurm $(ARGS)

# No dependency: the ranks import it where it has started them. Newer wheels want a newer glibc than Debian 12 has.
FT_LAUNCHER := build/nvidia-resiliency-ext-0.4.1

test-ft-launcher: .venv/.installed $(FT_LAUNCHER) ## ranks under NVIDIA's ft_launcher, which is fetched into build/
	PYTHONPATH=$(CURDIR)/$(FT_LAUNCHER) OMP_NUM_THREADS=1 $(PY) -m pytest tests/test_sections.py $(ARGS)

$(FT_LAUNCHER): | .venv/.installed
	rm -rf $@.part
	$(PY) -m pip install --quiet --no-deps --no-input --target $@.part $(subst ext-,ext==,$(@F)) nvidia-ml-py defusedxml
	mv $@.part $@

check: .venv/.installed ## formatting, lint, import layers, every test importable
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m pytest -q tests/test_layers.py
	$(PY) -m pytest --collect-only -qq > .venv/collected || { cat .venv/collected; exit 1; }

format: .venv/.installed ## formatting and what lint can put right
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: .venv/.installed ## time and memory of the loss beside its peers
	$(PY) tools/benchmarks/loss.py $(ARGS)

.venv/.installed: pyproject.toml $(wildcard $(CONSTRAINTS))
	@test -f $(CONSTRAINTS) || { echo "no versions were tested with this Python: $(CONSTRAINTS) is missing" >&2; \
		echo "hint: make PYTHON=python3.12 ... takes another; tested are $(wildcard constraints/*)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check --no-input -c $(CONSTRAINTS) -e '.[dev]'
	touch $@
