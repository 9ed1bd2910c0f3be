# Everything from a bare clone, with python3 (3.11 or newer) and make alone:
#   make train   trains a small Llama in FP4 (ARGS="--model=llama60m --recipe=bf16" for another)
#   make test    runs the tests
#   make test-gpu  runs the tests of the CUDA kernels, which need an H100 or H200 and nvcc
#   make lint    checks formatting, lint and types
# With a C++ compiler the install builds the kernels of the CPU, with nvcc as well those of the GPU.
# PYTHON picks the interpreter that the virtual environment is made with, VENV where it goes.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(), 8))')

# Where there is an NVIDIA driver, jax for the CUDA that it speaks.
CUDA = $(shell nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9]*\).*/\1/p')
EXTRAS = test,lint$(if $(CUDA),$(if $(filter 12,$(CUDA)),$(comma)cuda12,$(comma)cuda13))
comma := ,

BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: train test test-gpu lint format

train: $(STAMP)
	$(BIN)/python -m train.main $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Made again only when what is to be installed changes, so that later calls need no network.
$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(shell find cuda_ffi -type f)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "jfp4 needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --progress-bar on -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@
