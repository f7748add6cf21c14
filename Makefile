# Two commands: `make demo` and `make test`. Both make the environment they need. `make quick` runs the tests that a change
# needs most, in under a minute. `make test-native` checks the CPU kernels without Python, under sanitizers and for Arm;
# `make test-interop` fetches other tools, and holds mxdit against them; `make wheel` builds both packages into dist/,
# and uses each in environments of its own.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := .interop
PEERS_STAMP := $(PEERS)/.installed

.PHONY: demo quick test test-native test-interop lint wheel clean
.DELETE_ON_ERROR:

$(STAMP): pyproject.toml models/pyproject.toml constraints.txt $(wildcard csrc/cpu/*.*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[diffusers,video,eval,train,triton,dev]' -e ./models
	touch $@

demo: $(STAMP)
	$(BIN)/python tools/demo.py demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

quick: $(STAMP)
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -q -m "not slow"  # two processes on two cores

test: lint
	$(BIN)/pytest -n 2 --durations=15

test-native: $(STAMP)
	PYTHON=$(BIN)/python tests/native.sh

# The tools that mxdit reads from and writes for, in a folder that only their own processes see: one patches its libraries.
$(PEERS_STAMP): tests/interop/requirements.txt | $(STAMP)
	rm -rf $(PEERS)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-compile --target $(PEERS) -r tests/interop/requirements.txt
	touch $@

test-interop: $(PEERS_STAMP)
	$(BIN)/pytest tests/interop

wheel: $(STAMP)
	$(BIN)/python tools/check_wheel.py

clean:
	rm -rf demo build dist

# The documents as a site, in build/site. A broken link or a page outside the index is an error (not with --quiet, which
# does not count warnings).
DOCS_STAMP := $(VENV)/.installed-docs
$(DOCS_STAMP): constraints.txt | $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt mkdocs
	touch $@

.PHONY: docs
docs: $(DOCS_STAMP)
	$(BIN)/mkdocs build --strict
