# Two commands: `make demo` and `make test`. Both make the environment they need. `make quick` runs the tests that a change
# needs most, in under a minute. `make test-native` checks the CPU kernels without Python, under sanitizers and for Arm;
# `make test-serve` runs servers, and kills some; `make test-web` uses their page in Chromium; `make test-interop` fetches
# other tools, and holds mxdit against them; `make test-omni` runs vLLM-Omni with mxdit as its guest, and what
# holds on to diffusers' insides on its oldest release; `make wheel` builds both packages into dist/, and uses each in
# environments of its own.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := .interop
PEERS_STAMP := $(PEERS)/.installed
OMNI := .omni
OMNI_STAMP := $(OMNI)/.installed
OMNI_GUESTS := $(OMNI)/.guests

.PHONY: demo quick test test-native test-serve test-web test-interop test-omni lint wheel clean
.DELETE_ON_ERROR:

$(STAMP): pyproject.toml models/pyproject.toml constraints.txt $(wildcard csrc/cpu/*.*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[diffusers,video,serve,eval,train,triton,dev]' -e ./models
	touch $@

demo: $(STAMP)
	$(BIN)/python tools/demo.py demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

quick: $(STAMP)
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -q -m "not slow"  # two processes on two cores, a thread each

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --durations=15

test-native: $(STAMP)
	PYTHON=$(BIN)/python tests/native.sh

# The tools that mxdit reads from and writes for, in a folder that only their own processes see: one patches its libraries.
$(PEERS_STAMP): tests/interop/requirements.txt | $(STAMP)
	rm -rf $(PEERS)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-compile --target $(PEERS) -r tests/interop/requirements.txt
	touch $@

# Real servers with workers of their own, some of which are killed.
test-serve: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile tests/serve  # a file shares its server

# The page, in the system's Chromium or that of $CHROMIUM.
test-web: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/web

test-interop: $(PEERS_STAMP)
	$(BIN)/pytest tests/interop

# vLLM-Omni as it is published, in an environment of its own, because it pins other releases than ours. PyPI has no CPU build
# of torch for Linux; the one is asked of PyTorch's index, where pip has it from nowhere else.
$(OMNI_STAMP): tests/omni/requirements.txt
	rm -rf $(OMNI)
	$(PYTHON) -m venv $(OMNI)
	$(OMNI)/bin/pip install --quiet --disable-pip-version-check --no-deps --retries 1 \
	  --extra-index-url https://download.pytorch.org/whl/cpu $$(grep '^torch==' $<)
	$(OMNI)/bin/pip install --quiet --disable-pip-version-check --no-deps -r $<
	rm $(OMNI)/lib/python*/site-packages/torchaudio/lib/*.so  # built for CUDA; torchaudio does without, if it finds none
	touch $@

# What it finds by entry points: this checkout, and the platform that it runs on in tests.
$(OMNI_GUESTS): $(OMNI_STAMP) pyproject.toml $(wildcard csrc/cpu/*.* tests/omni/platform/* tests/omni/platform/*/*)
	$(OMNI)/bin/pip install --quiet --disable-pip-version-check --no-deps --force-reinstall -e . ./tests/omni/platform
	touch $@

# Its diffusers is the oldest that mxdit supports, so the tests of what holds on to diffusers' private parts run on it too,
# without the suite's conftest.py, which asks for more than is there.
test-omni: $(OMNI_GUESTS) | $(STAMP)
	$(BIN)/pyright -p tests/omni
	$(OMNI)/bin/pytest tests/omni
	$(OMNI)/bin/pytest -c tests/omni/pytest.ini --confcutdir tests/omni tests/test_attention_policy.py tests/test_fused.py

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
