# Every target makes its own environment ready; where it is ready, that takes milliseconds.
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-conditions test-slow test-long test-torch coverage lint types docs lock clean

BIN := .venv/bin
ANALYSIS_BIN := .venv-analysis/bin
TORCH_BIN := .venv-torch/bin
QUICK := not slow and not long
TORCH_TESTS := not slow and not long
# Tests wait a good deal, for processes that they start: three for two cores.
CORES := $(shell nproc 2>/dev/null || echo 2)
PYTEST := -m pytest -n $(shell expr $(CORES) + $(CORES) / 2) --dist worksteal \
	--durations=20 --durations-min=5

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile

setup: ## make .venv with all that featcache needs (Python 3.10; name one with PYTHON=...)
	@.ci/setup

demo: setup ## run featcache's demo
	@$(BIN)/featcache demo

# All of them on the newest Python and NumPy, and on 3.10 those that OneFlow or NumPy 1 can change.
test: lint types ## lint, types and the quick tests (ANALYSIS_PYTHON=... names a Python 3.11 to 3.13)
	@status=0; .ci/setup analysis || status=$$?; \
	if [ $$status -eq 3 ] && [ "$${CI-}" != true ]; then \
		echo "No Python newer than 3.10: all quick tests run on it, with NumPy 1."; \
		set -x; exec $(BIN)/python $(PYTEST) -m "$(QUICK)"; \
	fi; \
	[ $$status -eq 0 ] || exit 1; \
	set -x; \
	$(ANALYSIS_BIN)/python $(PYTEST) -m "$(QUICK) and not oneflow" && \
	$(BIN)/python $(PYTEST) -m "$(QUICK) and (oneflow or numpy1)"

test-conditions: ## what a machine can change: fonts, locale, time zone, rights, paths, cores
	@.ci/setup analysis && .ci/conditions

test-slow: setup ## the tests that take a minute or so each
	$(BIN)/python $(PYTEST) -m "slow and not long"

test-torch: ## the tests of PyTorch, Ray and S3 (TORCH_PYTHON=... names a Python 3.11 to 3.13)
	@status=0; .ci/setup torch || status=$$?; \
	if [ $$status -eq 3 ] && [ "$${CI-}" != true ]; then \
		echo "test-torch: skipped, for want of such a Python."; exit 0; \
	fi; \
	[ $$status -eq 0 ] || exit 1; \
	set -x; $(TORCH_BIN)/python $(PYTEST) -m "(torch or ray or s3) and $(TORCH_TESTS)"

test-long: setup ## the long forms of kill, fuzz and browser runs, which CI leaves out
	$(BIN)/python $(PYTEST) -m long
	@$(MAKE) test-torch TORCH_TESTS=long

coverage: setup ## what the quick tests cover on 3.10: the total, and .coverage with each test's lines
	$(BIN)/python $(PYTEST) -m "$(QUICK)" --cov=featcache --cov-context=test --cov-report=term

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
	rm -rf .venv .venv-analysis .venv-torch venv build dist .coverage
	rm -rf .mypy_cache .ruff_cache .pytest_cache
	find . -name .git -prune -o -name cache -prune -o \
		\( -name __pycache__ -o -name '*.egg-info' \) -prune -exec rm -rf {} +
