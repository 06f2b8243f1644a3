# Everything from a bare machine with Python and make. `make demo` shows what wellread does, `make test` checks it.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-all check bench table clean

demo: $(READY)
	$(BIN)/wellread demo --out demo --force

test: $(READY)
	$(BIN)/python -m pytest

test-all: $(READY)
	$(BIN)/python -m pytest -m "slow or not slow"

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

# make bench NAME=model_soup, with WELLREAD_DATA naming the folder of data sets; writes bench/results/model_soup.json
bench: $(READY)
	$(BIN)/python -m bench.$(NAME)

# the README's table of methods, from the cards
table: $(READY)
	$(BIN)/wellread list --markdown

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("wellread needs Python 3.10 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[zoo,dev]'
	touch $@

clean:
	rm -rf $(VENV) demo .mypy_cache .ruff_cache .pytest_cache
