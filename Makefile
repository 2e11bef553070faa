# Everything a user or a contributor runs. `make help` lists it.
VENV := .venv
PYTHON := $(VENV)/bin/python
BASE_PYTHON ?= python3
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install run test lint bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv with everything (run, test, lint and bench do it when it is missing)

$(STAMP): pyproject.toml constraints.txt
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "bilevel needs Python 3.11 or newer, and $(BASE_PYTHON) is older: make install BASE_PYTHON=python3.12"; exit 2; }
	test -x $(PYTHON) || $(BASE_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps islp==0.6.0
	@touch $(STAMP)

run: $(STAMP) ## the main job: penalties of a digit classifier by hypergradients, beside scikit-learn's grid
	$(PYTHON) -m experiments.train experiment=digits

test: $(STAMP) ## the whole test suite, doctests included
	$(PYTHON) -m pytest -n $(or $(JOBS),2)

lint: $(STAMP) ## ruff (style, imports, docstrings) and mypy (types)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(STAMP) ## the benchmarks; peers take part when the extra `peers` is installed
	$(PYTHON) -m benchmarks.operators
	$(PYTHON) -m benchmarks.hypergradient
	$(PYTHON) -m benchmarks.memory
	$(PYTHON) -m benchmarks.devices
	$(PYTHON) -m benchmarks.compiled
	$(PYTHON) -m benchmarks.overhead
	$(PYTHON) -m benchmarks.error_estimate
	$(PYTHON) -m benchmarks.planner
	$(PYTHON) -m benchmarks.time_to_accuracy
	$(PYTHON) -m benchmarks.damping
	$(PYTHON) -m benchmarks.tuning
	$(PYTHON) -m benchmarks.meta_gradient
	$(PYTHON) -m benchmarks.meta_step
	$(PYTHON) -m benchmarks.meta_memory
	$(PYTHON) -m benchmarks.meta_sinusoid
	$(PYTHON) -m benchmarks.meta_accuracy
	$(PYTHON) -m benchmarks.meta_omniglot
	$(PYTHON) -m benchmarks.hyper_cleaning
	$(PYTHON) -m benchmarks.stochastic
	$(PYTHON) -m benchmarks.text_penalties
	$(PYTHON) -m benchmarks.hpo
	$(PYTHON) -m benchmarks.weight_decay
	$(PYTHON) -m benchmarks.distillation
	$(PYTHON) -m benchmarks.reweighting
	$(PYTHON) -m benchmarks.sparse_penalties

clean: ## remove the environment and what runs have left
	rm -rf $(VENV) outputs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
