# A fresh machine needs Python 3.11 or newer, pip and make. `make` alone lists the targets.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
GPU_PROOF_ARGS ?=

RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test lint format types bench gpu-proof clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(STAMP) ## create .venv with everything in it (the other targets do so by themselves)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed; '$(PYTHON)' is `$(PYTHON) --version 2>&1`." \
	       "Name another one: make $(or $(MAKECMDGOALS),install) PYTHON=python3.12" >&2; exit 1; }
	@# Where Python came without its own pip bundle (ensurepip), the machine's pip fills the environment.
	$(PYTHON) -m venv $(VENV) 2>/dev/null || { $(PYTHON) -m venv --clear --without-pip $(VENV) && \
	  $(PYTHON) -m pip --python $(RUN) install pip; }
	$(RUN) -m pip install -e '.[dev]' -c constraints.txt
	@touch $@

demo: $(STAMP) ## train the main job: a byte-level GPT on a device far too small for it (4 minutes)
	$(RUN) -m lightning_superpipe.demo $(DEMO_ARGS)

# One thread per worker: on small machines threads of several workers only fight. The emulated device of the tests is
# built once, before the workers would all try to; where there is no C++ compiler its tests are skipped, but a CI that
# cannot build it has tested half, and fails. (`_exit`: autograd's thread for the device has just started, and aborts a
# process that ends before it is up.) No test collected is a failure too: pytest then exits with 5.
# A worker steals neighbours from another: tests of one file share what is made once for a file and process.
test: export OMP_NUM_THREADS = 1
test: $(STAMP) ## run the tests (PYTEST_ARGS="-k plan -x" chooses)
	$(RUN) -c 'import os, tests.emu; tests.emu.load(); os._exit(0)' || test -z "$$CI"
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

lint: $(STAMP) ## ruff: rules and formatting
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(STAMP) ## ruff: mend what can be mended
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

types: $(STAMP) ## mypy --strict on the package
	$(RUN) -m mypy

bench: $(STAMP) ## run every experiments/*/bench.py on this machine (BENCH_ARGS are handed to each)
	@set -e; for script in $(sort $(wildcard experiments/*/bench.py)); do echo "== $$script"; $(RUN) $$script $(BENCH_ARGS); done

gpu-proof: $(STAMP) ## tests, measurements and peers on a CUDA device; without one a tiny emulation of it
	$(RUN) experiments/gpu_proof/prove.py $(GPU_PROOF_ARGS)

clean: ## remove the environment, caches and outputs
	rm -rf $(VENV) build dist outputs lightning_logs .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
