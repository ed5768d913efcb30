# Everything a contributor types. Needs Python 3.10 or later, with its venv module, and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OLDEST := .venv-oldest

.PHONY: help install demo test slow oldest lint format clean

help:
	@echo "make install   make .venv and install the project with its tools"
	@echo "make demo      run every stage on the built-in shapes, ending in a report"
	@echo "make test      the fast tests        make slow   the long ones"
	@echo "make oldest    the fast tests with the oldest versions of everything that is used"
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

# The tools stay as they are: only what the package itself imports is old.
oldest:
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check -q -c constraints-oldest.txt \
		-e ".[metrics,compress]" "pytest>=8" "pytest-xdist>=3.6" "scikit-learn>=1.5" "setuptools>=77" build
	$(OLDEST)/bin/pytest -n 2

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
