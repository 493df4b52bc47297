# One word per task. Everything happens in .venv and build/; nothing outside the clone is touched.
#
#   make             .venv with everything, and the extension module built in place
#   make demo        quantize the bundled model, measure it, print a table, draw a picture
#   make test        the whole test suite         make test-slow   the tests that take minutes
#   make test-versions  the integrations with older releases of transformers, PEFT, ...
#   make bench       every kernel beside the machine's bandwidth and peak, and beside what else is installed
#   make asan        C and Python suites under AddressSanitizer and UndefinedBehaviorSanitizer
#   make tsan        C suite under ThreadSanitizer
#   make lint fmt    check / apply the formatters   make dist   sdist and wheel   make clean
#
# Variables:
#   PYTHON=python3.12        the interpreter that .venv is made from (3.10 to 3.14)
#   TORCH_SPEC=torch==2.13.0 which torch; TORCH_ARGS are extra arguments for pip, e.g. another index
#   TESTS="tests/py -k nf4"  arguments for pytest instead of the whole suite
#   OP=nf4                   which benchmarks (make bench): part of a name, or kernels, peers, never-slower
PYTHON ?= python3
VENV ?= .venv
TORCH_SPEC ?= torch==2.13.0
TORCH_ARGS ?=
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
TESTS ?=
OP ?=

BIN := $(VENV)/bin
PY := $(BIN)/python
PIP := $(PY) -m pip --disable-pip-version-check -q
C_SOURCES := $(shell find csrc cuda -name '*.[ch]' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)
C_TABLES := $(shell find csrc -name '*.def')
C_TESTS := $(shell find tests/c tests/cuda benchmarks -name '*.[ch]' -o -name '*.cpp' -o -name '*.cu' 2>/dev/null)
# Tests need no network, and must not look for any.
export HF_HUB_OFFLINE := 1
export TRANSFORMERS_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# Where there is a CUDA toolkit: the oldest architecture and the H100/H200's. pip install builds all.
export HALFBYTE_CUDA_ARCHS ?= 75;90

.PHONY: all demo test test-slow test-versions bench asan tsan lint fmt dist clean
.DELETE_ON_ERROR:

all: $(VENV)/.built

$(VENV)/.venv:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' || \
	    { echo "halfbyte: Python 3.10 to 3.14 needed; choose one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	    { echo "halfbyte: $(PYTHON) lacks ensurepip; on Debian: apt install python3-venv python3-dev" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig as s, sys; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' || \
	    { echo "halfbyte: $(PYTHON) lacks Python.h; on Debian: apt install python3-dev" >&2; exit 1; }
	@command -v $(CC) >/dev/null || { echo "halfbyte: no C compiler; on Debian: apt install gcc" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch comes first and alone: PyPI's default wheel for Linux drags in gigabytes of CUDA libraries that
# nothing here uses. So: a CPU wheel (version ending in +cpu) from the indexes that pip knows; else from
# PyTorch's own index; else what PyPI has.
$(VENV)/.torch: $(VENV)/.venv
	@echo "installing $(TORCH_SPEC)"
	@if [ -n "$(TORCH_ARGS)" ]; then $(PIP) install "$(TORCH_SPEC)" $(TORCH_ARGS); \
	elif $(PIP) install "$(TORCH_SPEC)+cpu" 2>/dev/null; then :; \
	elif $(PIP) install --retries 1 --timeout 20 --extra-index-url $(TORCH_CPU_INDEX) "$(TORCH_SPEC)+cpu" 2>/dev/null; then :; \
	else $(PIP) install "$(TORCH_SPEC)"; fi
	@touch $@

$(VENV)/.packages: requirements-dev.txt $(VENV)/.torch
	@echo "installing requirements-dev.txt"
	@$(PIP) install -r requirements-dev.txt
	@touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.packages
	@echo "building halfbyte"
	@$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@

$(VENV)/.built: $(VENV)/.installed setup.py $(C_SOURCES) $(C_TABLES)
	@$(PY) setup.py -q build_ext --inplace
	@touch $@

demo: $(VENV)/.built
	@$(BIN)/halfbyte demo tests/data/tiny-llama --text tests/data/heldout.txt --output demo-output

test: $(VENV)/.built
	@$(PY) -m pytest $(TESTS)

test-slow: $(VENV)/.built
	@$(PY) -m pytest -m slow $(TESTS)

# The integrations with older releases of transformers, PEFT and others, in environments under build/versions.
test-versions: $(VENV)/.built
	@$(PY) tests/compat/versions.py

bench: $(VENV)/.built
	@$(PY) -m benchmarks $(OP)

# The Python suite runs in a build of its own. torch and other big libraries work under AddressSanitizer when its
# runtime is loaded first; leak checking stays with the C suite, because the interpreter itself keeps memory.
# The path is absolute, for tests that start programs elsewhere.
ASAN := $(CURDIR)/build/asan
asan: $(VENV)/.built
	@$(PY) tests/c/build.py native --sanitize=address,undefined --run
	@HALFBYTE_SANITIZE=1 $(PY) setup.py -q build --build-base $(ASAN) --build-lib $(ASAN)/lib
	@LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	    PYTHONMALLOC=malloc PYTHONPATH=$(ASAN)/lib $(PY) -m pytest -m "not slow and not no_asan" $(or $(TESTS),tests/py tests/golden)

tsan: $(VENV)/.built
	@$(PY) tests/c/build.py native --sanitize=thread --run

lint: $(VENV)/.built
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run -Werror $(C_SOURCES) $(C_TESTS)
	@$(PY) -m pytest tests/lint

fmt: $(VENV)/.packages
	@$(BIN)/ruff check --fix-only . ; $(BIN)/ruff format .
	@$(BIN)/clang-format -i $(C_SOURCES) $(C_TESTS)

dist: $(VENV)/.built
	@$(PY) -m build

clean:
	rm -rf build dist demo-output python/*.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find python tests benchmarks -name '__pycache__' -prune -exec rm -rf {} + 2>/dev/null || true
	find python -name '*.so' -delete
	rm -rf $(VENV)
