# Targets install what they need into .venv, once for each change of pyproject.toml or constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
PYTEST_ARGS ?=

.PHONY: help install demo test test-all lint docs-test clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP) ## create .venv and install fxgrow with all its extras

# torch first: it decides which builds of the others fit, and a failure to find it should be the first thing said.
# A venv is made anew only where there is none, so that an interrupted install goes on where it stopped.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fxgrow needs Python 3.10 or newer: make PYTHON=python3.x")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[onnx,vision,report,files,tensorboard,lightning,transformers,accelerate,dev]'
	touch $@

demo: $(STAMP) ## grow a small network on handwritten digits, under two minutes
	$(BIN)/python -m examples.demo

test: $(STAMP) ## the fast tests
	$(BIN)/python -m pytest -q $(PYTEST_ARGS)

test-all: $(STAMP) ## the slow tests too
	$(BIN)/python -m pytest -q -m "" $(PYTEST_ARGS)

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs-test: $(STAMP) ## run the >>> lines of README.md, CONTRIBUTING.md and docs/
	$(BIN)/python -m docs.check

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
