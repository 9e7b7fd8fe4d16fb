# `make demo` and `make test` each do everything from a fresh clone, .venv included.

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BROWSER_STAMP := $(VENV)/.installed-browser
CONSTRAINTS := .ci/constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install demo test browser lint format parity bench gpu clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  PYTHON=python3.13     the interpreter that makes $(VENV) (3.11 or newer)"
	@echo "  ARGS=\"-k decoder\"     more arguments for test, parity and bench"

install: $(STAMP) ## Make .venv with the package, its tests and the parity check (the others do it when needed)

demo: $(STAMP) ## Render a synthetic clip and segment it into demo_output/
	$(BIN)/m2f-video demo --output demo_output

# Bytecode is kept, or each of the many processes that tests start would compile the package anew.
test: $(STAMP) ## Run the fast test suite in two processes
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

browser: $(BROWSER_STAMP) ## Test report pages in the Chromium or Chrome of this machine
	$(BIN)/python -m pytest -m browser tests/browser $(ARGS)

lint: $(STAMP) ## Check style and types, change nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP) ## Format the code and fix what ruff can fix
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

parity: $(STAMP) ## Compare every stage with the reference on random weights: accelerated, plain, float64
	$(BIN)/m2f-video parity --random 0 $(ARGS)
	$(BIN)/m2f-video parity --random 0 --plain $(ARGS)
	$(BIN)/m2f-video parity --random 0 --dtype float64 $(ARGS)

bench: $(STAMP) ## Measure speed
	$(BIN)/python benchmarks/speed.py $(ARGS)

gpu: ## Test and measure what runs on a CUDA GPU; needs no .venv, at most 8 minutes
	PYTHONPATH=. $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py $(ARGS)

clean: ## Remove caches and outputs, keep .venv
	rm -rf demo_output build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

# The stamp is touched last, so an install that broke off is taken up again by the next call.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "m2f-video needs Python 3.11 or newer, and '$(PYTHON)' is not that:" \
			"$$($(PYTHON) --version 2>&1). Name one, e.g. 'make install PYTHON=python3.13'." >&2; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c $(CONSTRAINTS) -e '.[test,parity,export]'
	@touch $@

$(BROWSER_STAMP): $(STAMP)
	$(BIN)/python -m pip install -c $(CONSTRAINTS) -e '.[browser]'
	@touch $@
