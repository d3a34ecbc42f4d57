# Needs git, make and a Python >= 3.11 with venv; everything else is installed into .venv from the lock.
# cpu or gpu; once set up for gpu it stays so until `make setup EXTRA=cpu`.
EXTRA ?= $(if $(wildcard .venv/.ready-gpu),gpu,cpu)
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13; do $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
UV_VERSION := 0.13.9
BIN := .venv/bin
READY := .venv/.ready-$(EXTRA)
SOURCES := src flows tests
# Python writes no bytecode if this is set, and then every import of torch or vLLM takes a minute.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup quickstart test test-beside test-fast test-contract test-e2e acceptance check format schema lock clean

setup: $(READY)

$(READY): requirements/$(EXTRA).txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 with its venv module found; install one (Debian, Ubuntu: apt-get install python3-venv) or give PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes --compile-bytecode requirements/$(EXTRA).txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	rm -f .venv/.ready-*
	touch $@

quickstart: setup
	$(BIN)/tuneserve quickstart

test: setup
	@# The tiny base model, which end-to-end tests and contracts share: made at once with all CPU, not beside them.
	$(BIN)/python -c "from pathlib import Path; from pipeline import basemodel, project; basemodel.resolve_base_model('tiny', project.Project(Path.cwd()), print)"
	$(MAKE) -j2 test-e2e test-beside

# What waits for nothing and nobody, in what CPU the end-to-end tests leave.
test-beside: setup
	nice $(MAKE) test-fast
	nice $(MAKE) test-contract

test-fast: setup
	$(BIN)/python -m pytest -m "not e2e" --ignore-glob "*_contract.py"

# Against the real ms-swift and vLLM, whose imports alone take longer than the fast tier.
test-contract: setup
	$(BIN)/python -m pytest --timeout 600 $(shell find tests -name "*_contract.py")

test-e2e: setup
	$(BIN)/python -m pytest -m e2e --timeout 1600

acceptance: setup
	$(BIN)/python -m pytest tests/acceptance -s --timeout 3600

check: setup
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

# The JSON Schemas that recipes point editors to; a test says when they are out of date.
schema: setup
	$(BIN)/python -m pipeline.schema recipes

lock: setup
	for extra in cpu gpu; do $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
		--extra $$extra --group dev pyproject.toml --output-file requirements/$$extra.txt; done

clean:
	rm -rf .venv .tuneserve .pytest_cache .mypy_cache .ruff_cache
	find mlruns -mindepth 1 -not -name README.md -delete
