# Every target does its own set-up in .venv; nothing but make and Python 3.11 or newer is needed.
# `requirements/constraints.txt` pins every version; pyproject.toml says which packages each target needs.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BENCH_THREADS ?= 1
# `make test TORCH=2.6.0` runs the tests with another torch (on Linux, pip brings its build for CUDA), in an environment
# of its own, without the versions that belong to the pinned one.
VENV := .venv$(if $(TORCH),-torch$(TORCH))
BIN := $(VENV)/bin
PINNED := requirements/constraints.txt
CONSTRAINTS := $(if $(TORCH),$(VENV)/constraints.txt,$(PINNED))
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)

# Idle OpenMP threads that spin would slow down whatever runs beside them.
export OMP_WAIT_POLICY := PASSIVE

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-all lint format docs gallery bench integrity clean

help:
	@echo "make demo      real data with and without a layer of each family (out/quickstart/)"
	@echo "make test      tests without the slow ones; TORCH=2.6.0 in an environment with that torch"
	@echo "make test-all  all tests"
	@echo "make lint      ruff, mypy, import-linter"
	@echo "make format    let ruff repair what it can"
	@echo "make docs      documentation, its examples in their quick form (docs/_build/html/)"
	@echo "make gallery   documentation, its examples as they are meant: twenty minutes"
	@echo "make bench     benchmarks against peers (benchmarks/results/, docs/benchmarks.md): over an hour"
	@echo "make integrity derivatives and failures of peers and ours (integrity/results.json, docs/integrity.md)"
	@echo "make clean     remove what the targets above have made, .venv too"

# ---------------------------------------------------------------------------------------------------------- set-up

# torch comes first and alone, so that no other package gets to choose its version.
$(VENV)/.base: pyproject.toml $(PINNED)
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=..."'
	@echo "Setting up $(VENV) (the first time takes minutes, most of it for torch)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifdef TORCH
	@grep -v -E '^(torch|torchvision|sympy|triton|setuptools)==' $(PINNED) > $(CONSTRAINTS)
	@echo 'torch==$(TORCH)' >> $(CONSTRAINTS)
endif
	@$(INSTALL) torch
	@$(INSTALL) hatchling editables
	@$(INSTALL) --no-build-isolation --editable .
	@touch $@

# .dev, .docs, .examples in $(VENV): the extras of pyproject.toml
$(VENV)/.%: $(VENV)/.base
	@$(INSTALL) --no-build-isolation --editable '.[$*]'
	@touch $@

# qpth and BOAT, peers in the benchmarks, ask for numpy<2 and work with numpy 2, which cvxpy asks for; betty asks for a
# Python below 3.11. So they cannot be in the extra: they come after it, as they are, without a look at what they ask for.
$(VENV)/.bench: $(VENV)/.base
	@$(INSTALL) --no-build-isolation --editable '.[bench]'
	@$(INSTALL) setuptools
	@$(INSTALL) --no-deps --no-build-isolation qpth
	@$(INSTALL) --no-deps --ignore-requires-python boat-torch==1.1.1 higher==0.2.1 betty-ml==0.2.1
	@touch $@

# --------------------------------------------------------------------------------------------------------- targets

demo: $(VENV)/.examples
	$(BIN)/python examples/quickstart.py

# Two processes with one thread each. DIFFLAYERS_TEST_DEVICE=cuda runs the same tests on a GPU.
test: export OMP_NUM_THREADS := 1
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: export OMP_NUM_THREADS := 1
test-all: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs
	$(BIN)/sphinx-build -W -n --keep-going -b html docs docs/_build/html

gallery: export DIFFLAYERS_GALLERY := full
gallery: docs

bench: export OMP_NUM_THREADS := $(BENCH_THREADS)
bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks --threads $(BENCH_THREADS)
	$(BIN)/python -m benchmarks --page

integrity: export OMP_NUM_THREADS := 1
integrity: $(VENV)/.bench
	$(BIN)/python -m integrity

clean:
	rm -rf .venv .venv-torch* build dist out docs/_build docs/gallery benchmarks/results/scratch
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
