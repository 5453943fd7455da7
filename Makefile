# One environment, .venv, made on demand: `make demo` installs what the command line needs, `make test` the rest.
# It is rebuilt only when pyproject.toml or constraints.txt change. Every target works on a fresh clone.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
MODEL ?= tiny
# Workers of pytest-xdist; 0 runs the tests in one process. A file stays with one worker: its fixtures are made once.
# tests/conftest.py says which files come first.
WORKERS ?= 2
PYTEST_ARGS ?=
CENSUS_ARGS ?=
MODELS_ARGS ?=
TRANSFORMERS_JS := 4.3.1

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Nothing here talks to a model hub. Numeric libraries share the cores, and do not take more than there are (in the
# tests each worker takes one).
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# Where llama.cpp's converter is there, its files are compared with the golden ones.
test: export TTEXPORT_LLAMA_CPP ?= $(patsubst %/.made,$(CURDIR)/%,$(wildcard .converter/.made))
demo bench: export OMP_NUM_THREADS ?= $(shell nproc)

.PHONY: help node converter demo quick test check lint types format bench census models clean
.DEFAULT_GOAL := help

help:
	@echo "make demo [MODEL=tiny|smollm2]  tune, merge, export and verify in ./demo-out"
	@echo "make quick [PYTEST_ARGS=...]    the tests that run no model, in under a minute"
	@echo "make test [PYTEST_ARGS=...]     all tests, llama.cpp and SmolLM2 included"
	@echo "make node                       transformers.js for the tests marked node; needs npm"
	@echo "make converter                  llama.cpp's converter for the tests marked converter"
	@echo "make check                      lint, types and tests"
	@echo "make census [CENSUS_ARGS=...]   merges of every model type and head of transformers"
	@echo "make models [MODELS_ARGS=--check]  the tables of exporter/models/data, from the installed transformers"
	@echo "make lint | types | format | bench | clean"

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	@touch $@

# The demo trains and writes a report, so both extras are part of it.
$(VENV)/.run: $(VENV)/.made pyproject.toml constraints.txt
	@echo "installing ttexport into $(VENV)"
	$(INSTALL) -e '.[tune,report]'
	@touch $@

# What `make quick` needs: everything but llama.cpp.
$(VENV)/.quick: $(VENV)/.run
	@echo "installing the development tools into $(VENV)"
	$(INSTALL) -e '.[tune,report,dev]'
	@touch $@

# llama.cpp is compiled here unless pip has its wheel: about five minutes on two cores.
$(VENV)/.dev: $(VENV)/.quick
	@echo "installing llama.cpp into $(VENV)"
	$(INSTALL) -e '.[tune,report,llamacpp,dev]'
	@touch $@

# The packages bring what they need; their install scripts would only fetch GPU libraries.
.node/.made: Makefile
	npm install --silent --ignore-scripts --no-audit --no-fund --prefix .node @huggingface/transformers@$(TRANSFORMERS_JS)
	@touch $@

node: .node/.made

.converter/.made: $(VENV)/.quick constraints.txt exporter/formats/gguf/converter/install.py
	$(BIN)/python -m tests.conformance.download .converter
	@touch $@

converter: .converter/.made

demo: $(VENV)/.run
	$(BIN)/python -m fixtures.demo --model $(MODEL)

quick: $(VENV)/.quick
	$(BIN)/python -m pytest --quick -n $(WORKERS) $(PYTEST_ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m fixtures.smollm2
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# Coverage is measured here alone: each room has a floor (tests/tiers/coverage.py).
check: lint types
	@$(MAKE) --no-print-directory test PYTEST_ARGS='--cov --cov-report= $(PYTEST_ARGS)'

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev
	@for script in $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py)); do \
		$(BIN)/python -m "benchmarks.$$(basename "$$script" .py)" || exit 1; \
	done

census: $(VENV)/.quick
	$(BIN)/python -m benchmarks.census $(CENSUS_ARGS)

models: $(VENV)/.quick
	$(BIN)/python -m exporter.models.generate $(MODELS_ARGS)

clean:
	rm -rf $(VENV) .node .converter .tiny build dist demo-out *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
