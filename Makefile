# ftc: `make quickstart` shows it working, `make test` checks it. Both set up .venv by themselves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
# Stamps: a set-up is done again only when pyproject.toml has changed.
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev
# Waiting threads sleep rather than spin, and two test processes take one core each.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help setup setup-dev quickstart test lint bench clean
.DEFAULT_GOAL := help

help: ## Say what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

setup: $(READY) ## Set up .venv to use ftc

setup-dev: $(READY_DEV) ## Set up .venv to work on ftc

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "ftc needs Python 3.11 or newer, and $(PYTHON) is older or missing; try: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# torch by itself first, in a version that is known: resolving it together with the rest can fetch gigabytes of other builds.
define install
	@$(BIN)/python -c 'import torch, sys; v = tuple(map(int, torch.__version__.split(".")[:2])); sys.exit(not (2, 11) <= v < (2, 14))' 2>/dev/null || \
		$(BIN)/python -m pip install --disable-pip-version-check -q $(TORCH)
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[$(1)]'
	@touch $@
endef

$(READY): pyproject.toml | $(BIN)/python
	$(call install,train)

$(READY_DEV): pyproject.toml | $(BIN)/python
	$(call install,dev)
	@touch $(READY)

quickstart: $(READY) ## Train, rewrite, prove, measure, generate, and write runs/quickstart/report.html
	$(BIN)/ftc run quickstart --out runs/quickstart

test: $(READY_DEV) lint ## Check the style and run the whole suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests

lint: $(READY_DEV) ## Check the style
	$(BIN)/ruff check .

bench: $(READY_DEV) ## Run every benchmark; each ends with one line of JSON
	@for file in benchmarks/*.py; do case $$file in */measure.py) ;; *) echo "== $$file"; $(BIN)/python $$file || exit 1;; esac; done

clean: ## Remove .venv, build products and caches (runs/ stays)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
