# make demo | test | test-tools | test-newest | lint | eval | clean. Each creates the environment it needs in .venv; a second run is fast.
PYTHON ?= python3
QUESTION ?= Tom has 124 apples. He buys 57 more and then gives 38 to Ana. How many apples does Tom have now?
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet -c constraints.txt

# What test-newest runs: forward, labels, every mode, continuation, export and remote loading, pipeline, NVIDIA's numbers.
NEWEST_TESTS := $(addprefix tests/test_,$(addsuffix .py,compat modeling objective generation unmasking \
	continuation cache contract pipeline)) $(addprefix tests/checkpoints/test_,inspection.py export.py) tests/mixins

.PHONY: demo test test-tools test-newest lint eval clean
.DELETE_ON_ERROR:

# Whatever signs the question has are its own, not make's or the shell's.
demo: .venv/.stamp-base
	$(BIN)/twotower generate --trace '$(subst ','\'',$(value QUESTION))'

test: lint
	$(BIN)/python tests/mixins/released_tests.py # downloads them, before several processes ask for them
	$(BIN)/pytest --ignore tests/tools -n auto --dist loadfile

# The tools people use such a model with: Trainer, accelerate, peft, TRL, lm-eval, grammars, quantisers, servers.
test-tools: .venv/.stamp-tools
	$(BIN)/pytest tests/tools tests/test_readme.py

# With the newest releases that pyproject.toml allows, in an environment of its own that is brought up to date each time.
test-newest: .venv-newest/.stamp-torch
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager -e '.[dev]' \
		"$$(grep ^torch== constraints.txt)"
	.venv-newest/bin/python -m pip list 2>/dev/null | grep -E '^(transformers|tokenizers|huggingface|accelerate|torch) '
	.venv-newest/bin/pytest $(NEWEST_TESTS)

lint: .venv/.stamp-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pre-commit validate-config

eval: .venv/.stamp-base
	$(BIN)/twotower eval --run-code

# Whose Triton kernels tests/tools/test_mamba_ssm.py runs in Triton's interpreter, and einops, which they import. Without
# its CUDA extension, which needs nvcc, and built here, since its setup.py would download one; without the rest of what it
# requires, which is for GPUs. As pip is to build with the installed torch, it needs what setup.py imports.
MAMBA_SSM := mamba-ssm==2.3.2.post1 einops==0.8.2

.venv/.stamp-tools: .venv/.stamp-dev
	$(PIP) -e '.[dev,tools]'
	$(PIP) setuptools ninja packaging
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE $(PIP) --no-deps --no-build-isolation $(MAMBA_SSM)
	touch $@

# Leaves .venv and .venv-newest in place.
clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path './.venv*' -prune -o -type d -name __pycache__ -exec rm -rf {} +

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

.venv-newest/.stamp-torch: constraints.txt
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet "$$(grep ^torch== constraints.txt)"
	touch $@

.venv/.stamp-base: .venv/.stamp-torch pyproject.toml
	$(PIP) -e .
	touch $@

.venv/.stamp-dev: .venv/.stamp-torch pyproject.toml
	$(PIP) -e '.[dev]'
	touch $@ .venv/.stamp-base
