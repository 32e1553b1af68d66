# `make demo` runs the main job, `make test` the tests; both set up .venv when they need it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
export JAX_PLATFORMS ?= cpu

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(BIN)/python experiments/compress_c2048.py

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) runs
