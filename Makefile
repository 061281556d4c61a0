# Everything runs in an environment of the clone's own. `make demo` and `make test` are all the set-up there is.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RECIPE ?= recipes/tiny.yaml

.PHONY: demo test lint bench soak docs clean

demo: $(VENV)/.installed
	$(BIN)/nexus run $(RECIPE)

test: $(VENV)/.installed
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks

soak: $(VENV)/.installed
	$(BIN)/python -m benchmarks.soak --kills 50

docs: $(VENV)/.installed
	$(BIN)/python -m nexus_core.recipe.documentation --write docs/recipes.md
	$(BIN)/python -m pytest tests/test_docs.py

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "NEXUS needs Python 3.11 or newer: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
