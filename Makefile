# Needs Python >= 3.11 and make; everything else is installed into .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Packages are compiled when they are imported, not all of them in advance, which would take longer than installing them.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
export PYTHONDONTWRITEBYTECODE =# with it, every process that a test starts would compile the package again

.PHONY: demo test soak fuzz check audit site clean

# Installs the runtime dependencies only; the other targets add what development needs.
demo: $(VENV)/.runtime
	$(BIN)/simpo demo

test: $(VENV)/.deepspeed
	$(BIN)/pytest -n auto

# What takes too long for make test, and more than a hundred kills at chosen and at random moments.
soak: $(VENV)/.deepspeed
	$(BIN)/pytest -n auto -m exhaustive
	SIMPO_SOAK_KILLS=20 $(BIN)/pytest -n auto tests/test_soak.py

# 28,000 broken and hostile inputs from a new seed, half an hour of processor time; make test runs a few fixed examples.
fuzz: $(VENV)/.dev
	SIMPO_FUZZ_SEED=$$(date +%s) SIMPO_FUZZ=1 $(BIN)/pytest -n 2 tests/fuzz/test_inputs.py

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# The documentation as a site with an API reference and search, in build/site.
site: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Known vulnerabilities of the pinned versions; asks the database of pip-audit over the network, and fails without it.
audit: $(VENV)/.dev
	$(INSTALL) pip-audit
	$(BIN)/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

$(VENV)/.runtime: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "simpo needs Python >= 3.11; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(INSTALL) -e '.[dev,docs]'
	@# axe-core, which checks the accessibility of pages, without the browser driver that this package is for.
	$(INSTALL) --no-deps axe-playwright-python
	@touch $@

# Only the tests need DeepSpeed. It is built from source, which requires torch to be installed first; its
# operators are not compiled.
$(VENV)/.deepspeed: $(VENV)/.dev
	$(INSTALL) setuptools wheel ninja py-cpuinfo
	DS_BUILD_OPS=0 $(INSTALL) --no-build-isolation deepspeed
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
