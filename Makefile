# Everything a contributor types. Needs Python 3.10 or later, with its venv module, and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install demo test slow lint format clean

help:
	@echo "make install   make .venv and install the project with its tools"
	@echo "make demo      run every stage on the built-in shapes, ending in a report"
	@echo "make test      the fast tests        make slow   the long ones"
	@echo "make lint      ruff and mypy         make format rewrite the layout"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[dev]"
	@touch $(INSTALLED)

demo: install
	$(BIN)/vqgen run --config shapes

test: install
	$(BIN)/pytest -n 2

slow: install
	$(BIN)/pytest -n 2 -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
