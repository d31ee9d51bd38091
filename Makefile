# `make quickstart` and `make test` set everything up by themselves; they need only Python 3.10+ and pip.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export TOKENIZERS_PARALLELISM = false

.PHONY: quickstart test slow check clean

quickstart: $(VENV)/.installed
	$(BIN)/hub quickstart --out quickstart-out --json quickstart-out/report.json

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2

slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch goes first and pinned: left to a resolver, it would bring gigabytes of CUDA libraries.
$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) quickstart-out .pytest_cache .mypy_cache .ruff_cache
