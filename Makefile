# Two commands do everything: `make train` and `make test`. Each sets up .venv itself.
#
#   make train [ARGS="--config.moe.num_experts=16"] [WORKDIR=runs/mine]
#   make test | test-all | lint | benchmark | clean
#
# PYTHON=... names the interpreter for .venv; without it, the newest one that is
# supported and found on the PATH. GNU make 3.81, which macOS has, is enough.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKDIR ?= runs/default
ARGS ?=
# Two test processes: each wants about one core, and memory is dear.
JOBS ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup train test test-all lint format benchmark clean

help:
	@sed -n '3,4s/^# *//p' Makefile

setup: $(STAMP)

# The stamp is written last, so an interrupted install starts over.
$(STAMP): setup.py constraints.txt tools/find_python.sh
	@rm -f $(STAMP)
	@python=$$(bash tools/find_python.sh "$(PYTHON)") && \
	  echo "Setting up $(VENV) with $$python" && \
	  { [ -x $(BIN)/python ] && $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || "$$python" -m venv --clear $(VENV); }
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $(STAMP)

train: $(STAMP)
	$(BIN)/python -m experiments.train --workdir=$(WORKDIR) $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -q -n $(JOBS) -m "not slow" $(ARGS)

test-all: $(STAMP)
	$(BIN)/python -m pytest -q -n $(JOBS) $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: $(STAMP)
	$(BIN)/python -m tools.benchmark_layer $(ARGS)

# Runs are results and stay; `rm -r runs` is yours to type.
clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
