# On a machine that has Python 3.11-3.13 and make:
#   make quickstart   create the environment, then train and explain a small lookup circuit
#   make test         create the environment, then lint, type-check and test
#   make docs         build the documentation's site in build/site, strictly
#   make test-lens4   create .venv-lens4.3.0 with TransformerLens 4.3, then test what runs on it
#   make fuzz         put damaged files, hostile words, kills and full disks to it; an hour
#   make test-tools   create .venv-tools with Lightning and the trackers, then test with them
# Variables:
#   PYTHON=python3.12   the interpreter that creates the environment
#   TORCH=cpu           download PyTorch's CPU build (Linux; the default there carries CUDA)
#   VENV=.venv          where the environment goes
#   LENS=4.3.0          the TransformerLens of test-lens4, each in an environment of its own

PYTHON ?= python3
VENV ?= .venv
TORCH ?= default
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CONSTRAINTS ?= constraints.txt
EXTRA ?= dev
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
export MPLBACKEND ?= Agg
unexport PYTHONDONTWRITEBYTECODE  # modules are compiled once, not by each process of the tests

.PHONY: help environment quickstart test test-lens4 test-tools test-system fuzz lint types layers unit docs bench

help:
	@sed -n '2,13s/^# \{0,1\}//p' Makefile

environment: $(READY)

$(READY): pyproject.toml $(CONSTRAINTS)
	@echo "== environment in $(VENV): PyTorch, TransformerLens and tools, a few hundred MB to download"
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 14) else "make: $(PYTHON) is Python %d.%d; set PYTHON to 3.11, 3.12 or 3.13" % v[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(TORCH),cpu)
	@$(PIP) install -c $(CONSTRAINTS) --index-url https://download.pytorch.org/whl/cpu torch
endif
	@$(PIP) install -c $(CONSTRAINTS) -e ".[$(EXTRA)]"
	@touch $(READY)

quickstart: $(READY)
	@$(BIN)/circuit quickstart

test: lint
	@$(MAKE) --no-print-directory -j2 types layers unit  # mypy has one process
	@echo "== all checks passed"

lint: $(READY)
	@echo "== ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet . || { echo "run: $(BIN)/ruff format ."; exit 1; }

types: $(READY)
	@echo "== mypy"
	@$(BIN)/mypy

layers: $(READY)
	@echo "== import layers"
	@$(BIN)/lint-imports --no-logo 2>/dev/null || $(BIN)/lint-imports

unit: $(READY)
	@echo "== pytest"
	@$(BIN)/pytest -m "not system and not slow" -n 2 --dist loadfile --no-loadscope-reorder

# laws that hold for both kinds of model; the files beside them build HookedTransformers
LENS ?= 4.3.0
LENS4 := build/constraints-lens$(LENS).txt
LENS4_TESTS := tests/core/test_parameter_names.py tests/lens4 \
	$(addprefix tests/model/test_,components.py dla.py layout.py stages.py subspaces.py) \
	$(addprefix tests/reports/test_,each_report.py export.py induction_progress.py \
		modular_addition_progress.py new_shapes.py) \
	tests/runs/test_watch.py tests/tasks/test_runs_of_tasks.py \
	$(addprefix tests/attribution/test_,credit.py influence.py window.py) \
	$(addprefix tests/trace/test_,extension.py terms.py) \
	$(addprefix tests/training/test_,loop.py moments.py)

test-lens4: $(LENS4)
	@$(MAKE) --no-print-directory environment VENV=.venv-lens$(LENS) EXTRA=test CONSTRAINTS=$(LENS4)
	@.venv-lens$(LENS)/bin/pytest -m "not system and not slow" -n 2 --dist loadfile $(LENS4_TESTS)

$(LENS4): constraints.txt
	@mkdir -p $(@D)
	@sed 's/^transformer-lens==.*/transformer-lens==$(LENS)/' constraints.txt > $@

test-tools:
	@$(MAKE) --no-print-directory environment VENV=.venv-tools EXTRA=tools
	@.venv-tools/bin/pytest tests/tools

test-system: $(READY)
	@$(BIN)/pytest -m "system and not slow"

fuzz: $(READY)
	@$(BIN)/pytest -rP -m system tests/fuzz

# a public name, option or page that says nothing fails in the tests, a dead link or anchor in both
docs: $(VENV)/.docs
	@$(BIN)/pytest tests/test_docs.py tests/test_guide.py
	@SOURCE_DATE_EPOCH=0 NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "== open build/site/index.html"

$(VENV)/.docs: $(READY)
	@$(PIP) install -c $(CONSTRAINTS) -e ".[docs]"
	@touch $@

bench: $(READY)
	@$(BIN)/python benchmarks/train_step.py
