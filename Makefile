# Python 3.11 or newer and make are all that a machine needs: each target builds the environment it runs in.
#
#   make demo ARGS="--tiny"                a target's program takes ARGS
#   make test PYTHON=/opt/python3.12/bin/python3
#   make test TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"      a build of torch without CUDA

VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_ARGS ?=
ARGS ?=

# The first interpreter on the path that is new enough.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help demo test check docs docs-check torture bench matrix clients clean

help:
	@echo "make demo    prune a pretrained encoder end to end and print what it brought"
	@echo "make test    the default test run"
	@echo "make check   ruff, mypy, vulture and import-linter"
	@echo "make docs    the documentation as a site, on http://127.0.0.1:8000 (ARGS=\"-a 127.0.0.1:8080\" for another port)"
	@echo "make docs-check  build the site; a link that leads nowhere is an error"
	@echo "make torture kill runs and let them go on; change files and read them (a quarter of an hour)"
	@echo "make bench   the benchmarks (on a quiet machine), into docs/benchmarks.md"
	@echo "make matrix  smoke tests with the oldest and newest releases supported, each in its own environment"
	@echo "make clients load one pruned model without cofiprune: transformers, engines, other languages (needs npm)"
	@echo "make clean   remove the environment, caches and build output"

# torch goes first and alone: where pip is configured with a local folder of wheels, the build found there is the one
# that everything else is then resolved against.
$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "Setting up $(VENV); the first time this takes some minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)" $(TORCH_ARGS)
	$(BIN)/python -m pip install --quiet --editable ".[dev,examples]"
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/quickstart.py $(ARGS)

# One thread per worker, and none that spins while it waits: two workers then share two cores without fighting.
test: $(STAMP)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --timeout=600 $(ARGS)

# import-linter's cache goes by modification times and can miss a change within the same second; it saves nothing here.
check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/vulture
	$(BIN)/lint-imports --no-cache

# Its own environment: the site needs nothing of the package.
DOCS := $(VENV)-docs
$(DOCS)/.installed: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet $$($(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	@touch $@

docs: $(DOCS)/.installed
	$(DOCS)/bin/mkdocs serve --strict $(ARGS)

docs-check: $(DOCS)/.installed
	$(DOCS)/bin/mkdocs build --strict $(ARGS)

torture: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/torture/kills.py $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python tests/torture/fuzz.py $(ARGS)

# The profile is made whatever failed before it; make fails in the end all the same.
bench: $(STAMP)
	$(BIN)/python -m pytest tests/bench -m bench -s -rs --tables docs/benchmarks.md $(ARGS); failed=$$?; \
	$(BIN)/python tests/bench/profile_step.py --tables docs/benchmarks.md && exit $$failed

# Python 3.11 to 3.13 as far as they are on the path; ARGS="--only 3.12" for some of the combinations.
matrix:
	$(PYTHON) tests/matrix.py --torch-args="$(TORCH_ARGS)" $(ARGS)

clients: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable ".[openvino]" sentence-transformers
	$(BIN)/python tests/clients.py --torch "$(TORCH)" --torch-args="$(TORCH_ARGS)" $(ARGS)

clean:
	rm -rf $(VENV) $(DOCS) build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
