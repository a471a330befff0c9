# make book   set up .venv, build the executed book            (first run: minutes; again: quick)
# make test   set up .venv and .venv-sweep, lint, types, tests, notebooks
# make sweep  run what is missing of the grid in workflow/config.yaml; ARGS=-n: say what that is; ARGS=summary: how much is done
# make results-table   rewrite the results of README.md and of book/all_results.md from book/results
# make notebooks       run the notebooks, refresh their checked text, drop all other output
# make clean  remove what the other targets made, environments included; records in runs/ stay

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# the first interpreter that is new enough; override with PYTHON=...
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
EXTRAS := .[book,test]
# Snakemake's own environment: the requirements of the extra `sweep`, without the project
SWEEP_VENV ?= .venv-sweep
SWEEP_READY := $(SWEEP_VENV)/.ready
SWEEP_EXTRA = $$($(PYTHON) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['sweep'])")
export HYPERDP_SNAKEMAKE ?= $(abspath $(SWEEP_VENV)/bin/snakemake)
ARGS ?=
JOBS ?= 2

# On shared cores two spinning OpenMP threads are slower than one; processes share the cores instead.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= passive
export PYTHONHASHSEED ?= 0
export HF_HUB_OFFLINE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

# $(call step,what it does,command): say it, do it, say how long it took
define step
	@echo "==> $(1)"; from=$$SECONDS; $(2); echo "    done: $(1) ($$((SECONDS - from)) s)"
endef

.PHONY: help setup book test lint types pytest notebooks sweep results-table clean

help:
	@sed -n '/^# make/s/^# //p' Makefile

setup: $(READY)

$(READY): pyproject.toml requirements.lock
	@test -n "$(PYTHON)" || { echo "HyperDP needs Python 3.11 or newer; none found. Install one or say PYTHON=/path/to/python."; exit 1; }
	$(call step,creating $(VENV) with $(PYTHON),$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || { echo "python -m venv failed; on Debian and Ubuntu: apt install python3-venv"; exit 1; })
	$(call step,installing hyperdp with the versions of requirements.lock (two to ten minutes the first time),$(BIN)/python -m pip install --quiet --progress-bar off -c requirements.lock -e '$(EXTRAS)')
	@touch $(READY)

$(SWEEP_READY): pyproject.toml workflow/requirements.lock
	$(call step,creating $(SWEEP_VENV) with Snakemake (half a minute the first time),$(SWEEP_VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(SWEEP_VENV); $(SWEEP_VENV)/bin/python -m pip install --quiet --progress-bar off -c workflow/requirements.lock $(SWEEP_EXTRA))
	@touch $(SWEEP_READY)

book: $(READY)
	$(call step,building the book: runs what changed and stops at any warning,$(BIN)/python -m hyperdp_lib.pages.notebook --book)
	@echo "    open _build/html/index.html"

test: lint types pytest
	@echo "==> all checks passed"

lint: $(READY)
	$(call step,lint: ruff check,$(BIN)/ruff check .)

types: $(READY)
	$(call step,types: mypy,$(BIN)/mypy)

pytest: $(READY) $(SWEEP_READY)
	$(call step,tests and notebooks: pytest with nbval on $(JOBS) processes,$(BIN)/python -m pytest -n $(JOBS) --dist loadscope --doctest-modules --nbval-lax hyperdp_lib tests notebooks)

notebooks: $(READY)
	$(call step,running the notebooks and refreshing their checked text,$(BIN)/python -m hyperdp_lib.pages.notebook notebooks/*.ipynb)

sweep: $(READY) $(SWEEP_READY)
	@$(HYPERDP_SNAKEMAKE) $(ARGS) --profile workflow/profiles/laptop --config python=$(BIN)/python

results-table: $(READY)
	$(call step,writing the results into README.md and book/all_results.md,$(BIN)/python -m hyperdp_lib.pages.front_page)

clean:
	rm -rf $(VENV) $(SWEEP_VENV) .snakemake _build .mypy_cache .ruff_cache .pytest_cache .hypothesis hyperdp.egg-info
