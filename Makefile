# make demo | test | check (lint and test side by side): each makes .venv first, from constraints.txt. Another Python: make PYTHON=python3.12 test
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The tests use small nets: two processes of one thread each beat one process of two. Each takes a half in order, so
# that what a file prepares is prepared once, and then of what the other has left.
WORKERS ?= 2
THREADS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

# Where containers forbid it, every process that a test starts would compile all sources anew, for about a second.
export PYTHONDONTWRITEBYTECODE :=

# Threads that wait by spinning take a shared core from those that work: up to six times slower beside another job.
export OMP_WAIT_POLICY := passive

.PHONY: demo test lint check format readme
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/taut demo --out taut-demo

test: $(STAMP)
	$(THREADS) $(BIN)/pytest -n $(WORKERS) --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: $(STAMP)
	$(MAKE) --jobs=2 lint test

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

readme: $(STAMP)
	$(BIN)/python benchmarks/readme.py
	$(BIN)/python docs/layers.py

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
