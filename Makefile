# demo: the main job on a real model.   test: the tests.   check: what CI runs.   bench: speed.   docs: generated pages.
# All of them set up a virtual environment first; the first time this builds llama-cpp-python, some six minutes.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MODELS := build/models
DEMO := $(MODELS)/smollm2-135m
# Most rows have 576 weights, which fit no 256-weight block, so this model can have no fewer than 3.9 bits.
DEMO_BITS := 4.5
DEMO_FILE := build/smollm2-135m-$(DEMO_BITS).gguf
PROMPT := What is the capital of France?
# Processes that run the tests; each holds the models it makes in memory, up to 2 GB.
WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: help install demo test check types pages pytest bench docs clean

help:
	@sed -n 1,2p Makefile

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt hatch_build.py lieq_gguf/native/block_encoder.cpp
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --constraint constraints.txt --editable . --group dev
	touch $@

$(DEMO)/model.safetensors: | install
	$(BIN)/python tools/make_demo_model.py $(DEMO)

demo: install $(DEMO)/model.safetensors
	$(BIN)/lieq-gguf convert $(DEMO) --bits $(DEMO_BITS) -o $(DEMO_FILE) --force
	$(BIN)/lieq-gguf inspect $(DEMO_FILE)
	$(BIN)/lieq-gguf run $(DEMO_FILE) "$(PROMPT)"
	$(BIN)/lieq-gguf eval $(DEMO_FILE) --reference $(DEMO) --chunks 4 --tasks demo
	$(BIN)/lieq-gguf bench $(DEMO_FILE)

test: install pytest

pytest:
	$(PYTEST)

# What takes a second goes first. Types and pages each keep one core busy for a minute, so the tests run beside them.
check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(MAKE) --no-print-directory -j 3 types pages pytest

types:
	$(BIN)/mypy

pages:
	$(BIN)/python tools/make_cli_docs.py --check
	$(BIN)/python tools/make_models_docs.py --check

bench: install $(DEMO)/model.safetensors
	$(BIN)/python tools/bench_budgets.py $(DEMO) 4.5 5.5 6.5 8.5

docs: install
	$(BIN)/python tools/make_cli_docs.py
	$(BIN)/python tools/make_models_docs.py

clean:
	rm -rf build .mypy_cache .pytest_cache .ruff_cache
