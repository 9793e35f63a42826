# Every target sets up what it needs: a fresh machine wants only Python 3.11+ and pip.

PYTHON   ?= python3
TORCH    ?= torch==2.13.0
HOST     ?= 127.0.0.1
PORT     ?= 8000
MODEL    ?= nano
COVERAGE ?= 90

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev serve test test-slow lint train-nano bench bench-train study-mhc study-balance study-engram clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.base ## virtual environment with what serving and training need

setup-dev: $(VENV)/.dev

serve: $(VENV)/.base ## API and playground on HOST:PORT (127.0.0.1:8000) with MODEL (nano)
	@$(BIN)/fourfold serve $(MODEL) --host $(HOST) --port $(PORT)

test: $(VENV)/.dev ## ruff, the floors contract, the tests; floors 0-3 must be covered to COVERAGE percent
	@$(BIN)/ruff check .
	@$(BIN)/lint-imports
	@$(BIN)/python -m slipcover --dont-wrap-pytest --fail-under $(COVERAGE) -m pytest

test-slow: $(VENV)/.dev ## the tests that take minutes
	@$(BIN)/python -m pytest -m slow

lint: $(VENV)/.dev ## ruff, the floors contract, types of floors 0-2
	@$(BIN)/ruff check .
	@$(BIN)/lint-imports
	@$(BIN)/mypy

train-nano: $(VENV)/.dev ## build the data and train the bundled model again from its recipe
	@$(BIN)/fourfold data build smoke
	@$(BIN)/fourfold train recipes/nano.toml

bench: $(VENV)/.dev ## run every benchmark but the longest (loading, soak) and sparsity, which wants data; results under bench/results
	@for script in bench/[a-z]*.py; do \
		case $$script in bench/study_*|bench/loading.py|bench/soak.py|bench/sparsity.py) continue ;; esac; \
		echo "bench: $$script"; \
		$(BIN)/python $$script --json bench/results/$$(basename $$script .py).json || exit 1; \
	done

bench-train: $(VENV)/.dev ## speed of a training step beside transformers, V3 and V4, eager and compiled
	@$(BIN)/python bench/train.py --json bench/results/train.json

study-mhc: $(VENV)/.dev ## stability of plain, hc and mhc by depth and learning rate (hours; goes on where it stopped)
	@$(BIN)/python bench/study_mhc.py

study-balance: $(VENV)/.dev ## evenness of experts by bias, auxiliary loss or nothing (goes on where it stopped)
	@$(BIN)/python bench/study_balance.py

study-engram: $(VENV)/.dev ## experts traded for Engram tables: bits and recall (an hour; goes on where it stopped)
	@$(BIN)/python bench/study_engram.py --workers 2

clean: ## remove the virtual environment
	rm -rf $(VENV)

# A stamp is written last, so a broken set-up starts again and a finished one costs nothing.

$(VENV)/.base: pyproject.toml hatch_build.py $(wildcard fourfold/ops/cpu/native/*.cpp fourfold/ops/cpu/native/*.h)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "setup: needs Python 3.11 or newer, found " + sys.version.split()[0])'
	@echo "setup: virtual environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) 2>/dev/null || $(PYTHON) -m venv --without-pip $(VENV)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m pip --python $(BIN)/python install --quiet pip
	@echo "setup: $(TORCH) (the largest download)"
	@$(PIP) "$(TORCH)"
	@echo "setup: fourfold and what it needs"
	@$(PIP) --editable .
	@touch $@
	@echo "setup: done"

$(VENV)/.dev: $(VENV)/.base
	@echo "setup: tools for tests and training"
	@$(PIP) --editable '.[train,data,dev]'
	@touch $@
	@echo "setup: done"
