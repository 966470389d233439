# Every target installs first when needed: on a fresh clone, `make demo` or `make test` is enough.
.DEFAULT_GOAL := help
.PHONY: help install demo test test-unit test-cluster test-gpu test-compat lint format bench dist clean

NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do $$p -c '$(NEW_ENOUGH)' 2>/dev/null && echo $$p && break; done)
CHECK_PYTHON = @'$(PYTHON)' -c '$(NEW_ENOUGH)' 2>/dev/null || { echo "raydistill needs Python 3.11 or newer; found: $$('$(or $(PYTHON),python3)' --version 2>&1). Install it, or name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
BIN := .venv/bin
INSTALLED := .venv/.installed

# The oldest DSPy that pyproject.toml takes, in an environment of its own.
COMPAT_DSPY := 3.1.2
COMPAT := .venv-compat
COMPAT_INSTALLED := $(COMPAT)/.installed

# What training is timed against, in an environment of its own.
TRL := .venv-trl
TRL_INSTALLED := $(TRL)/.installed

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

install: $(INSTALLED)  ## make .venv with everything, at the versions of constraints.txt

$(INSTALLED): pyproject.toml constraints.txt
	$(CHECK_PYTHON)
	@echo "Installing into .venv (a minute or two, most of it for torch and ray) ..."
	'$(PYTHON)' -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(INSTALLED)  ## distil the tickets example, evaluate it and serve it: no key, no GPU
	$(BIN)/python -m examples.tickets.demo

test: $(INSTALLED)  ## unit and integration tests
	$(BIN)/python -m pytest tests/unit tests/integration

test-unit: $(INSTALLED)  ## unit tests only: seconds
	$(BIN)/python -m pytest tests/unit

test-cluster: $(INSTALLED)  ## several Ray nodes on this machine, that join and are killed: minutes
	$(BIN)/python -m pytest tests/cluster

test-gpu: $(INSTALLED)  ## what needs an NVIDIA GPU; skipped where there is none
	$(BIN)/python -m pytest tests/gpu

test-compat: $(COMPAT_INSTALLED)  ## what touches DSPy, tested on the oldest one supported
	LITELLM_LOCAL_MODEL_COST_MAP=True $(COMPAT)/bin/python -m pytest -m dspy tests/unit tests/integration

# That DSPy names the exact gepa that it takes; everything else is as in .venv.
$(COMPAT_INSTALLED): pyproject.toml constraints.txt
	$(CHECK_PYTHON)
	@echo "Installing into $(COMPAT), with DSPy $(COMPAT_DSPY) ..."
	'$(PYTHON)' -m venv $(COMPAT)
	sed -E 's/^dspy==.*/dspy==$(COMPAT_DSPY)/; /^gepa==/d' constraints.txt > $(COMPAT)/constraints.txt
	$(COMPAT)/bin/pip install -q --disable-pip-version-check -c $(COMPAT)/constraints.txt -e ".[dev]"
	@touch $@

lint: $(INSTALLED)  ## ruff and mypy
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: $(INSTALLED)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

bench: $(INSTALLED) $(TRL_INSTALLED)  ## run every benchmark: make bench DATA=DIR, the folder of Banking77's files
	set -e; for name in $(basename $(notdir $(wildcard benchmarks/[!_]*.py))); do $(BIN)/python -m benchmarks.$$name --data '$(or $(DATA),$(error give the folder of Banking77 files: make bench DATA=DIR))'; done

$(TRL_INSTALLED):
	$(CHECK_PYTHON)
	'$(PYTHON)' -m venv $(TRL)
	$(TRL)/bin/pip install -q --disable-pip-version-check trl==1.16.0
	@touch $@

dist: $(INSTALLED)  ## the wheel and constraints that cluster.yaml installs on each node
	rm -rf build dist && $(BIN)/pip wheel -q --no-deps -w dist . && cp constraints.txt dist/

clean:  ## remove the environments, caches and build outputs; runs/ stays
	rm -rf .venv $(COMPAT) $(TRL) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
