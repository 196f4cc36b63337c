# `make demo` and `make test` do all the set-up they need, into .venv at the root.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test scale-test check bench gpu-test clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: setup
	$(BIN)/slipstream demo --picture demo.png

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m "not gpu and not ray" -n 2

# Two Ray nodes on this machine: minutes, and a quarter of a GB of Ray, so they are no part of `make test`.
scale-test: setup
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,scale]"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/deploy

check: setup
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layering.py

bench: setup
	$(BIN)/python benchmarks/decode_cpu.py --json benchmarks/results/cpu/decode_cpu.json

# On a machine with an NVIDIA GPU, in whatever environment holds torch: PYTHON=python3 make gpu-test
gpu-test:
	PYTHONPATH=src $(PYTHON) -m pytest tests -m gpu

clean:
	rm -rf $(VENV) demo.png runs
