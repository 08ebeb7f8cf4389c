PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed

export HF_HUB_OFFLINE ?= 1
export NO_ALBUMENTATIONS_UPDATE ?= 1

.PHONY: install quickstart test test-all check

install: $(READY)

# setuptools first, so that the build takes the pinned one and not whatever is newest that day.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit("needs Python 3.11 to 3.13, PYTHON=$(PYTHON) is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@

quickstart: $(READY)
	$(BIN)/python tools/train.py recipes/quickstart_digits.yaml

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two tests at a time, with one thread each.
test: check
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

# GPU tests skip themselves where there is no CUDA.
test-all: check
	$(BIN)/pytest -m ''
