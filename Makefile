# `make quickstart` and `make test` set everything up by themselves; they need only Python 3.10+ and pip.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export TOKENIZERS_PARALLELISM = false
QUICK  := tests/compose/algebra tests/compose/expr tests/compose/planning tests/contracts/test_contract_laws.py \
          tests/contracts/test_contract_rows.py tests/contracts/test_contract_coverage.py \
          tests/hub/test_ref.py tests/hub/test_manifest.py tests/hub/test_store.py tests/hub/storage tests/hub/project \
          tests/router/test_gating.py tests/router/test_routing_laws.py tests/train/test_train_config.py

.PHONY: quickstart test quick slow check docs clean

quickstart: $(VENV)/.installed
	$(BIN)/hub quickstart --out quickstart-out --json quickstart-out/report.json

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2

# What says most in about two minutes: the laws of the algebra, refs, manifests, the store, plans, gating, configurations.
quick: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 -q $(QUICK)

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

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) quickstart-out site .pytest_cache .mypy_cache .ruff_cache
