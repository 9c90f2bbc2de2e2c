# Every target makes its own environment ready; where it is ready, that takes milliseconds.
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-analysis test-torch lint types docs lock clean

BIN := .venv/bin
ANALYSIS_BIN := .venv-analysis/bin
TORCH_BIN := .venv-torch/bin
TORCH_TESTS := not slow and (torch or ray or s3)
# Tests wait a good deal, for processes that they start: three for two cores.
CORES := $(shell nproc 2>/dev/null || echo 2)
PYTEST := -m pytest -n $(shell expr $(CORES) + $(CORES) / 2) --dist worksteal \
	--durations=20 --durations-min=5

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

setup: ## make .venv with all that featcache needs (Python 3.10; name one with PYTHON=...)
	@.ci/setup

demo: setup ## run featcache's demo
	@$(BIN)/featcache demo

test: lint types ## lint, types and every test that takes seconds
	$(BIN)/python $(PYTEST) -m "not slow"

test-slow: setup ## the tests that take minutes
	$(BIN)/python $(PYTEST) -m slow

# Pages of the documentation speak of the full installation: they run there alone.
test-analysis: ## the tests without OneFlow on NumPy 2 (Python 3.11 to 3.13; ANALYSIS_PYTHON=...)
	@status=0; .ci/setup analysis || status=$$?; \
	if [ $$status -eq 3 ] && [ "$${CI-}" != true ]; then \
		echo "test-analysis: skipped, for want of such a Python."; exit 0; \
	fi; \
	[ $$status -eq 0 ] || exit 1; \
	set -x; $(ANALYSIS_BIN)/python $(PYTEST) -m "not slow and not oneflow and not page"

test-torch: ## the tests of PyTorch and Ray (Python 3.11 to 3.13; TORCH_PYTHON=...)
	@status=0; .ci/setup torch || status=$$?; \
	if [ $$status -eq 3 ] && [ "$${CI-}" != true ]; then \
		echo "test-torch: skipped, for want of such a Python."; exit 0; \
	fi; \
	[ $$status -eq 0 ] || exit 1; \
	set -x; $(TORCH_BIN)/python $(PYTEST) -m "$(TORCH_TESTS)"

lint: setup ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup ## mypy over the library and the launcher
	$(BIN)/mypy

docs: setup ## write docs/reference.md anew from the docstrings
	$(BIN)/python docs/build_reference.py

lock: ## write .ci/lock-*.txt anew from pyproject.toml (newer releases too: UPGRADE=1)
	@.ci/lock

clean: ## remove environments, build outputs and the tools' caches; cache/ stays
	rm -rf .venv .venv-analysis .venv-torch venv build dist .mypy_cache .ruff_cache .pytest_cache
	find . -name .git -prune -o -name cache -prune -o \
		\( -name __pycache__ -o -name '*.egg-info' \) -prune -exec rm -rf {} +
