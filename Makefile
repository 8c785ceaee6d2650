# make run       install what is missing, and start the server
# make test      install what is missing; lint, check types, run the tests
# make test-all  the same, and the tests that take longer, measure, or need nginx
# make help      everything else

PYTHON ?= python3
VENV := .venv
NODE := benchmarks/peers/node
ARGS ?=

# Tests start many processes, which share compiled bytecode.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test test-all long more lint types tests docs bench prove fuzz scale search worst format lock clean help

run: $(VENV)/run-ready
	@exec $(VENV)/bin/openchat $(ARGS)

test: lint types tests

# One after the other, also under `make -j`: `more` measures, and nothing else may run meanwhile.
test-all: test
	@$(MAKE) --no-print-directory long
	@$(MAKE) --no-print-directory more

lint: $(VENV)/test-ready
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

types: $(VENV)/test-ready
	$(VENV)/bin/mypy

tests: $(VENV)/test-ready
	$(VENV)/bin/pytest -n 4 $(ARGS)

long: $(VENV)/test-ready  ## the tests that take longer
	$(VENV)/bin/pytest -n 3 -m long $(ARGS)

more: $(VENV)/test-ready  ## the tests that measure or need nginx, one at a time
	@PATH="$$PATH:/usr/sbin" command -v nginx >/dev/null || \
	    { echo "These tests need nginx, which is missing: apt-get install nginx-light (Debian), brew install nginx (macOS)"; exit 1; }
	$(VENV)/bin/pytest -m more $(ARGS)

format: $(VENV)/test-ready  ## format the code and fix what can be fixed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: $(VENV)/test-ready  ## write the generated parts of docs/
	$(VENV)/bin/python -m server.describe docs

bench: $(VENV)/test-ready $(NODE)/node_modules  ## compare with other servers (half an hour, needs Node.js)
	$(VENV)/bin/python -m benchmarks $(ARGS)

prove: $(VENV)/test-ready  ## cause faults in a cluster under load, and compare clients with the database (eight minutes)
	$(VENV)/bin/openchat prove $(ARGS)

fuzz: $(VENV)/test-ready  ## fuzz the decoder and the HTTP endpoints for two minutes (Linux)
	$(VENV)/bin/pip install -q --disable-pip-version-check 'atheris>=3' 'schemathesis>=4'
	$(VENV)/bin/python fuzz/frames.py -max_total_time=60 -max_len=2000
	$(VENV)/bin/python fuzz/requests_of_all_kinds.py
	$(VENV)/bin/python fuzz/garbage.py

scale: $(VENV)/test-ready  ## simulate a million connections, from measured costs
	$(VENV)/bin/python -m benchmarks.scale $(ARGS)

search: $(VENV)/test-ready  ## measure searches in a million messages (two minutes)
	$(VENV)/bin/python -m benchmarks.search $(ARGS)

worst: $(VENV)/test-ready  ## measure the max cost of each frame, for an account at its bounds (ten minutes)
	$(VENV)/bin/python -m benchmarks.worst $(ARGS)

$(NODE)/node_modules: $(NODE)/package-lock.json
	npm ci --prefix $(NODE) --no-audit --no-fund

lock:  ## lock the newest versions that pyproject.toml allows (needs uv)
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
	    pyproject.toml -o requirements.lock
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
	    pyproject.toml --group dev -o requirements-dev.lock

clean:  ## delete the virtual environment and caches, but not the data folder
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis

help:
	@sed -n '1,4s/^# //p' Makefile; sed -n 's/^\([a-z]*\):.*## /make \1 - /p' Makefile

$(VENV)/bin/python:
	@echo "Setting up $(VENV) …"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "OpenChat needs Python 3.11 or later. Name one with PYTHON=…"; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/run-ready: requirements.lock pyproject.toml | $(VENV)/bin/python
	@echo "Installing what OpenChat needs (about a minute, this once) …"
	@$(VENV)/bin/pip install -q --disable-pip-version-check --require-hashes -r requirements.lock
	@$(VENV)/bin/pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@

$(VENV)/test-ready: requirements-dev.lock pyproject.toml | $(VENV)/bin/python
	@echo "Installing what OpenChat and its tests need (about a minute, this once) …"
	@$(VENV)/bin/pip install -q --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@$(VENV)/bin/pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@ $(VENV)/run-ready
