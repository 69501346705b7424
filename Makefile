# make demo | test | check | bench | soak: each makes its own .venv first, and again when the requirements have changed.

PYTHON ?= python3
STORE ?= sqlite
BROKER ?= in-memory
INPUT ?=
ARGS ?=
SECONDS ?= 600
SEED ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check bench soak format requirements clean
.DELETE_ON_ERROR:

demo: $(READY)
	$(BIN)/statecast demo --store $(STORE) --broker $(BROKER) $(if $(INPUT),--input '$(INPUT)') $(ARGS)

test: check
	$(BIN)/pytest $(ARGS)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)
	$(BIN)/python -m benchmarks $(ARGS)

soak: $(READY)
	$(BIN)/python -m tests.crash.soak --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Writes down, with hashes, what pyproject.toml asks for; needs uv. With ARGS=--upgrade it takes the newest of all.
requirements:
	uv pip compile pyproject.toml --all-extras --group dev --generate-hashes --universal --python-version 3.11 \
	  --no-header --quiet --output-file requirements-dev.txt $(ARGS)

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(READY): pyproject.toml requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "statecast needs Python 3.11 or newer; name one with: make PYTHON=python3.13"; exit 1; }
	@if command -v uv > /dev/null; then \
	  uv venv --quiet --allow-existing --python "$$(command -v $(PYTHON))" $(VENV) \
	  && uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements-dev.txt \
	  && uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .; \
	else \
	  $(PYTHON) -m venv $(VENV) \
	  && $(BIN)/python -m pip install --quiet --require-hashes -r requirements-dev.txt \
	  && $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .; \
	fi
	@touch $@
