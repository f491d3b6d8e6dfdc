# The workshop. `make` lists the targets; each of them sets up what it needs first.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test soak lint bench lock clean

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## .venv with the locked packages, mvwan itself, and the system libraries for rendering

$(INSTALLED): requirements.lock pyproject.toml scripts/rendering_libraries.sh
	@test -x $(BIN)/python || { $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$$($(PYTHON) --version): mvwan needs Python 3.11 or newer. Run: make setup PYTHON=python3.11" >&2; exit 2; }; \
		$(PYTHON) -m venv .venv; }
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	bash scripts/rendering_libraries.sh $(BIN)/python
	@touch $@

demo: $(INSTALLED) ## record demonstrations, fine-tune with the switch off and on, write runs/demo/report.html
	$(BIN)/mvwan demo

test: $(INSTALLED) ## every test
	@$(BIN)/python -m pytest

soak: $(INSTALLED) ## kill training 200 times and compare what resumes with a run that nobody disturbed; some ten minutes
	$(BIN)/python scripts/soak.py

lint: $(INSTALLED) ## ruff (rules and format), pyright, shellcheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/shellcheck --external-sources scripts/*.sh configs/slurm/train.sbatch .ci/run

bench: $(INSTALLED) ## steps beside peers and the floor, costs, the way of the data, growth: runs/bench
	$(BIN)/mvwan bench --output runs/bench

lock: ## resolve pyproject.toml anew and rewrite requirements.lock
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet '.[sim,view,bench,cluster,quantize,dev]'
	{ sed -n '/^#/p' requirements.lock; build/lock/bin/python -m pip freeze --all --exclude pip --exclude mvwan | sed 's/+cpu$$//'; } > build/requirements.lock
	mv build/requirements.lock requirements.lock

clean: ## remove caches and build products; runs/ and .venv stay
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
