# make demo | test | lint | eval | clean. Each creates the environment it needs in .venv; a second run is fast.
PYTHON ?= python3
QUESTION ?= Tom has 124 apples. He buys 57 more and then gives 38 to Ana. How many apples does Tom have now?
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet -c constraints.txt

.PHONY: demo test lint eval clean
.DELETE_ON_ERROR:

demo: .venv/.stamp-base
	$(BIN)/twotower generate "$(QUESTION)"

test: lint
	$(BIN)/pytest

lint: .venv/.stamp-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pre-commit validate-config

eval: .venv/.stamp-base
	$(BIN)/twotower eval

# Leaves .venv in place.
clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +

# .venv/typing/twotower is the root under its package name, for mypy.
.venv/.stamp-venv:
	$(PYTHON) -m venv .venv
	mkdir -p .venv/typing
	ln -sfn ../.. .venv/typing/twotower
	touch $@

.venv/.stamp-torch: .venv/.stamp-venv constraints.txt
	@echo "Installing PyTorch into .venv; the first time may take a few minutes."
	$(PIP) torch
	touch $@

.venv/.stamp-base: .venv/.stamp-torch pyproject.toml
	$(PIP) -e .
	touch $@

.venv/.stamp-dev: .venv/.stamp-torch pyproject.toml
	$(PIP) -e '.[dev]'
	touch $@ .venv/.stamp-base
