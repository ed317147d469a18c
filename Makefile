# make demo   sets everything up and shows a model that grows while it trains
# make test   sets everything up and runs the whole test suite
# make chaos  kills and freezes senders, readers and Redis a thousand times: nothing may be lost, nothing had twice
# Another torch build:  make demo TORCH_INDEX=URL   (the index that PyTorch's "Get started" page names)
# More for the command: make demo ARGS=--fast    make test ARGS='-k report' WORKERS=4    make chaos ARGS=--quick
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH_INDEX ?=
ARGS ?=
WORKERS ?= 2

.PHONY: demo test chaos lint setup clean proto
.DEFAULT_GOAL := demo

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] <= (3, 12) else "esper_ray needs Python 3.11 or 3.12; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/python examples/demo.py --compare $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

test: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=$(WORKERS) $(ARGS)

chaos: setup
	$(BIN)/python -m benchmarks.chaos $(ARGS)

proto: setup
	$(BIN)/esper contracts approve

clean:
	rm -rf $(VENV) build *.egg-info
