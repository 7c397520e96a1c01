# Each target sets up what it needs: Python >= 3.11 and pip are enough.
#   PYTHON=python3.11      the interpreter the environment is made with
#   TORCH_INDEX=URL        where else torch may come from: by default the index of CPU builds (no CUDA);
#                          for an NVIDIA card e.g. TORCH_INDEX=https://download.pytorch.org/whl/cu128
#   JOBS=2                 processes that the tests use, one thread each
#   CELLS=FILE.h5ad        counts with gene symbols, for the benchmarks of embedding and training
PYTHON ?= python3
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
JOBS ?= 2
CELLS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check
READY := $(VENV)/.ready
ONE_THREAD := OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1

.PHONY: help demo test test-slow lint docs bench gpu-check

help:
	@echo "make demo | test | test-slow | lint | docs | bench | gpu-check"

# torch first and alone, so that nothing else decides which build is taken
$(READY): pyproject.toml constraints.txt
	@echo "setting up $(VENV): about 2.7 GB, some minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade "pip>=25.1"
	$(PIP) --no-deps --constraint constraints.txt --extra-index-url "$(TORCH_INDEX)" --retries 1 --timeout 30 torch
	$(PIP) --constraint constraints.txt --editable ".[report,evaluate,cluster,harmony,hub,census]" --group test --group lint
	touch $@

$(VENV)/.ready-docs: $(READY)
	$(PIP) --constraint constraints.txt --editable ".[docs]"
	touch $@

demo: $(READY)
	$(BIN)/annformer demo --out demo --overwrite

test: $(READY)
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS)

test-slow: $(READY)
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) -m "slow and not gpu"

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

docs: $(VENV)/.ready-docs
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build

bench: $(READY)
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/parity.py tests/golden
	$(BIN)/python benchmarks/tokenizer.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/loading.py
	$(BIN)/python benchmarks/attention.py
	@test -n "$(CELLS)" || echo "make bench CELLS=FILE.h5ad (counts, gene symbols) also measures embedding and training"
	test -z "$(CELLS)" || $(BIN)/python benchmarks/embedding.py "$(CELLS)"
	test -z "$(CELLS)" || $(BIN)/python benchmarks/training.py "$(CELLS)" --memory

# needs a CUDA device and a torch built for it (TORCH_INDEX above); one message and exit status 2 where there is none
gpu-check: $(READY)
	$(BIN)/python benchmarks/gpu.py --check
	$(BIN)/python -m pytest -m gpu tests/model/test_attention_gpu.py
	$(BIN)/python benchmarks/gpu.py
