# Two commands do everything: `make train` and `make test`. Each sets up .venv itself.
#
#   make train [ARGS="--config.moe.num_experts=16"] [WORKDIR=runs/mine]
#   make test | test-thorough | test-core | test-all | test-matrix | test-bucket |
#     test-browser | test-slurm | test-hf | test-lm-eval | test-image | lint | docs |
#     benchmark | clean
#
# PYTHON=3.12, or the path of an interpreter, says what to make .venv with; without it,
# the newest one that is supported and found on the PATH. VENV=.venv-3.12 puts it
# elsewhere. GNU make 3.81, which macOS has, is enough.

SHELL := /bin/bash
VENV := .venv
HF_VENV := .venv-hf
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKDIR ?= runs/default
ARGS ?=
# Two test processes: each wants about one core, and memory is dear.
JOBS ?= 2
# Whoever is done takes over from the other's end: a file's fixtures are made once.
SPREAD = -n $(JOBS) --dist=worksteal
# What a change of Python or jax breaks first: numerics, layers, the step, checkpoints,
# command lines. CI runs it under the Pythons that do not get the whole suite.
CORE := tests/routing tests/experts tests/dispatch tests/layers tests/models \
  tests/sharding tests/hlo tests/launch tests/multi_device/test_expert_parallel.py \
  tests/multi_device/test_exchange_cells.py \
  tests/data/sources/test_local.py \
  tests/data/test_batches.py tests/train/test_step.py tests/train/test_loop.py \
  tests/train/test_optimizer.py tests/checkpoint/test_manager.py tests/evaluate \
  tests/cli tests/config/test_check.py tests/config/test_text.py \
  tests/test_packaging.py
ANYWHERE := not browser and not slurm and not lm_eval and not hf and not image
FAST := not slow and not thorough and $(ANYWHERE)
THOROUGH := thorough and not slow and $(ANYWHERE)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup train test test-thorough test-core test-all test-bucket test-browser \
  test-slurm test-hf test-lm-eval test-image test-matrix lint format docs benchmark clean

help:
	@sed -n '3,6s/^# *//p' Makefile

setup: $(STAMP)

# An environment that is there stays, unless another Python was asked for by PYTHON.
VERSION := -c 'import sys; print(sys.version_info[:2])'
KEEP_VENV = [ -x $(BIN)/python ] && \
  $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' && \
  { [ -z "$(PYTHON)" ] || \
    [ "$$($(BIN)/python $(VERSION))" = "$$("$$python" $(VERSION))" ]; }

# The stamp is written last, so an interrupted install starts over.
$(STAMP): setup.py constraints.txt tools/find_python.sh
	@rm -f $(STAMP)
	@python=$$(bash tools/find_python.sh "$(PYTHON)") && \
	  echo "Setting up $(VENV) with $$python" && \
	  { $(KEEP_VENV) || "$$python" -m venv --clear $(VENV); }
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $(STAMP)

train: $(STAMP)
	$(BIN)/python -m experiments.train --workdir=$(WORKDIR) $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -q $(SPREAD) -m "$(FAST)" $(ARGS)

# What CI runs besides.
test-thorough: $(STAMP)
	$(BIN)/python -m pytest -q $(SPREAD) -m "$(THOROUGH)" $(ARGS)

test-core: $(STAMP)
	$(BIN)/python -m pytest -q $(SPREAD) -m "$(FAST)" $(CORE) $(ARGS)

# The fast tests under every supported Python that is here, each in its own environment.
test-matrix:
	@bash tools/test_matrix.sh test

# Then the targets that need more than Python; what is missing is named.
test-all: $(STAMP)
	$(BIN)/python -m pytest -q $(SPREAD) -m "$(ANYWHERE) and not bucket" $(ARGS)
	$(MAKE) test-bucket
	@if command -v "$${CHROMIUM:-chromium}" > /dev/null; then $(MAKE) test-browser; \
	else echo "Not run: make test-browser (chromium is not on the PATH)."; fi
	@if command -v sbatch > /dev/null && [ "$$(id -u)" = 0 ]; then $(MAKE) test-slurm; \
	else echo "Not run: make test-slurm (needs Slurm and root)."; fi
	@if [ -x $(HF_VENV)/bin/python ]; then $(MAKE) test-hf; \
	else echo "Not run: make test-hf (installs torch and transformers in $(HF_VENV))."; fi
	@if $(BIN)/python -c "import lm_eval" 2> /dev/null; then $(MAKE) test-lm-eval; \
	else echo "Not run: make test-lm-eval (installs lm_eval in $(VENV))."; fi
	@if $(BIN)/python -m pip install --quiet --dry-run --ignore-installed --no-deps absl-py; \
	then $(MAKE) test-image; \
	else echo "Not run: make test-image (pip reaches no index)."; fi

# Runs in a bucket: an emulated one, through which faults are sent. The quick ones are
# in `make test`, too.
test-bucket: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	CI=1 $(BIN)/python -m pytest -q $(SPREAD) -m bucket tests/buckets $(ARGS)

# The pages of reports and analyses in Chromium, which must be installed: chromium on the
# PATH, or CHROMIUM=its path.
test-browser: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[browser]"
	$(BIN)/python -m pytest -q -m browser tests/sweep/report/test_page.py \
	  tests/analysis/explorer/test_browser.py $(ARGS)

# Jobs of a sweep on a real Slurm, which is started in a temporary directory.
test-slurm: $(STAMP)
	@for name in slurmctld slurmd munged; do \
	  PATH="$$PATH:/usr/sbin:/sbin" command -v $$name > /dev/null || { \
	    echo "error: make test-slurm needs $$name, which is not on the PATH. On Debian:" \
	      "apt-get install slurm-wlm munge." >&2; exit 1; }; done
	@[ "$$(id -u)" = 0 ] || { \
	  echo "error: make test-slurm must run as root: it starts Slurm's daemons." >&2; \
	  exit 1; }
	$(BIN)/python -m pytest -q -m slurm tests/sweep tests/deploy $(ARGS)

# Published models against Transformers and the evaluation harness's own model. In an
# environment of their own: torch is large, and other tests run without it.
test-hf: $(STAMP)
	@[ -x $(HF_VENV)/bin/python ] || $(BIN)/python -m venv $(HF_VENV)
	$(HF_VENV)/bin/python -m pip install --quiet --constraint constraints.txt \
	  --editable ".[hf-test]"
	MOEJAX_TRANSFORMERS_PYTHON=$(HF_VENV)/bin/python $(BIN)/python -m pytest -q -m hf \
	  tests/interop/test_transformers.py tests/evaluate/test_lm_eval_hf.py $(ARGS)

# A run on tasks of the real lm-evaluation-harness, from files; fails where the extra
# cannot be installed.
test-lm-eval: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[lm-eval]"
	@$(BIN)/python -c "import lm_eval"  # Without it, all would be skipped.
	$(BIN)/python -m pytest -q -m lm_eval tests/evaluate/test_lm_eval.py $(ARGS)

# What docs/launching/Dockerfile makes: by docker where its daemon is reached, else its
# steps, in a new environment and directory.
test-image: $(STAMP)
	$(BIN)/python -m pytest -q -m image tests/deploy/test_image.py $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The API reference, into site/.
docs: $(STAMP)
	$(BIN)/python -m tools.api_docs $(ARGS)

benchmark: $(STAMP)
	$(BIN)/python -m tools.benchmark_layer $(ARGS)

# Runs are results and stay; `rm -r runs` is yours to type.
clean:
	rm -rf $(VENV) $(HF_VENV) .venv-3.* build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +
