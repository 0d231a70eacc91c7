# Targets install what they need into .venv, once for each change of pyproject.toml or constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
PYTEST_ARGS ?=
NAME ?= demo_seeds
ARGS ?=

.PHONY: help install demo test test-all lint audit format docs-test docs-tables benchmarks benchmark clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 13
	@echo
	@echo 'make PYTHON=python3.12 install           another Python'
	@echo 'make test PYTEST_ARGS="tests/ops -x"     a part of the tests'
	@echo 'make benchmark NAME=scaling ARGS=--help  one benchmark'

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

test: $(STAMP) ## run the fast tests
	$(BIN)/python -m pytest -q $(PYTEST_ARGS)

test-all: $(STAMP) ## run the slow tests too
	$(BIN)/python -m pytest -q -m "" $(PYTEST_ARGS)

lint: $(STAMP) ## check with ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: $(STAMP) ## check the library with bandit, and what is installed for known vulnerabilities
	$(BIN)/bandit -q -r fxgrow
	$(BIN)/python .ci/audit.py

format: $(STAMP) ## format and fix with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs-test: $(STAMP) ## run the >>> lines of README.md, CONTRIBUTING.md and docs/
	$(BIN)/python -m docs.check

docs-tables: $(STAMP) ## write docs/optimizers.md anew
	$(BIN)/python -m docs.optimizers

benchmarks: ## list the benchmarks and the questions that they answer
	@sed -n 's/^| \(.*\) | `\([a-z_0-9]*\)` |.*/\2\t\1/p' benchmarks/README.md | expand -t 18

benchmark: $(STAMP) ## run one: NAME=demo_seeds ARGS="--seeds 2"
	$(BIN)/python -m benchmarks.$(NAME) $(ARGS)

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
