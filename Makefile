# make help lists the targets. PYTHON chooses the interpreter that the virtual environment is made from.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILT := $(VENV)/.built
LINTERS := $(VENV)/.linters
SHIM := pymirror/_shim.abi3.so
SHIM_SOURCES := $(wildcard native/*.[ch]) native/build_shim.py setup.py pymirror/_version.py
C_FILES = $(wildcard native/*.[ch] native/tests/*.[ch] native/fuzz/*.[ch] benchmarks/*.[ch] benchmarks/floor/*.[ch]) tests/conductor.c
PY_DIRS = $(wildcard pymirror tests native examples benchmarks) _pymirror_cli.py setup.py

PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
PIP += $(shell test -w "$${HOME:-/nonexistent}" || echo --no-cache-dir)

# A virtual environment knows the folder it was made in: in a moved or copied clone it would import the old one.
ifneq ($(shell cat $(VENV)/.where 2>/dev/null),$(CURDIR))
$(BUILT): FORCE
else ifeq ($(wildcard $(SHIM)),)
$(BUILT): FORCE
endif

.PHONY: build test demo lint format check-native check-asan check-features wheel check-wheel bench clean help FORCE
.DEFAULT_GOAL := build

build: $(BUILT) ## compile the shim and install pymirror into .venv, editable
	@:

test: build ## C tests, then pytest; PYTEST_ARGS= adds options
	@$(MAKE) -s -C native test
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

demo: build ## a driver racing the kernel, in a few seconds; DEMO_ARGS= adds options
	@$(BIN)/pymirror demo $(DEMO_ARGS)

lint: build $(LINTERS) ## ruff, mypy --strict, clang-format; changes nothing
	@$(BIN)/ruff check -q $(PY_DIRS)
	@$(BIN)/ruff format -q --check $(PY_DIRS) || { echo "make format puts these files right" >&2; exit 1; }
	@$(BIN)/mypy --strict --no-error-summary pymirror _pymirror_cli.py
	@$(BIN)/clang-format --dry-run -Werror $(C_FILES)

format: build $(LINTERS) ## put the layout of Python and C files right
	@$(BIN)/ruff check -q --select I --fix $(PY_DIRS)
	@$(BIN)/ruff format -q $(PY_DIRS)
	@$(BIN)/clang-format -i $(C_FILES)

check-native: ## C tests: plain, with ASan and UBSan, with TSan
	@$(MAKE) -s -C native check

# Some tests without each feature, all tests without many at once. SUBSTITUTED: only speed or exactness is lost.
COMMA := ,
EMPTY :=
together = $(subst $(EMPTY) $(EMPTY),$(COMMA),$(strip $1))
SUBSTITUTED := pagemap_scan procmap_query populate event_fork wp_unpopulated wp_async
FEATURES ?= $(SUBSTITUTED) move io_uring guard pfn sigbus uffd uffd_kernel uffd_events process_vm pagemap \
	$(call together,$(SUBSTITUTED))
FEATURE_TESTS ?= $(addprefix tests/test_,walk.py hmm.py mm.py notifier.py page_table.py device.py gup.py migrate.py \
	migrate_copied.py migrate_used.py migrate_ends.py exclusive.py hmm_dma_map.py)
AT_ONCE ?= $(call together,move pagemap_scan procmap_query wp_async io_uring pfn)
AT_ONCE_TESTS ?= tests
without = echo "without $1" && PYMIRROR_DISABLE=$1 $(BIN)/python -m pytest $2 $(PYTEST_ARGS)

check-features: build ## tests with features switched off: FEATURES= one by one, AT_ONCE= all tests without these
	@for off in $(FEATURES); do $(call without,$$off,$(FEATURE_TESTS)) || exit 1; done
	@$(if $(AT_ONCE),$(call without,$(AT_ONCE),$(AT_ONCE_TESTS)))

# What an earlier version left in build/lib would be in the wheel.
wheel: build ## an abi3 wheel for this machine's libc, in dist/
	@mkdir -p build && exec 9>build/.lock && flock 9 && \
	rm -rf build/lib* build/bdist* build/temp* dist/*.whl && \
	$(BIN)/python -m pip wheel -qq --disable-pip-version-check --no-deps --no-build-isolation -w dist .
	@ls dist/*.whl

check-wheel: wheel ## the wheel in a virtual environment of its own, without a compiler
	@sh tests/check_wheel.sh dist/*.whl

check-asan: build ## Python tests on a shim with ASan and UBSan, and leak checks; ASAN_TESTS=tests for all of them
	@tests/check_asan.sh $(ASAN_TESTS)

bench: build ## the benchmarks; BENCH_ARGS= adds options
	@$(BIN)/pymirror bench $(BENCH_ARGS)

clean: ## remove everything that make made
	@rm -rf $(VENV) build dist *.egg-info $(SHIM) .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

# Two of these at once in one clone would trample each other, hence the lock.
$(BUILT): pyproject.toml $(SHIM_SOURCES)
	@$(call preflight)
	@echo "make build: compiling the shim and filling $(VENV), about a minute" >&2
	@mkdir -p build && exec 9>build/.lock && flock 9 && \
	{ test "$$(cat $(VENV)/.where 2>/dev/null)" = '$(CURDIR)' || \
	{ $(PYTHON) -m venv --clear $(VENV) && echo '$(CURDIR)' >$(VENV)/.where; }; } && \
	$(BIN)/python native/build_shim.py --requires >build/requires.txt && \
	$(PIP) -r build/requires.txt && \
	$(PIP) --no-build-isolation -e '.[test]' && touch $@

$(LINTERS): pyproject.toml | $(BUILT)
	@$(PIP) --no-build-isolation -e '.[dev]' && touch $@ $(BUILT)

define preflight
set -e; fail() { echo "make build: $$1" >&2; exit 1; }; \
command -v $(PYTHON) >/dev/null || fail "no $(PYTHON) here; name an interpreter: make PYTHON=python3.12"; \
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	fail "needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V 2>&1); name another: make PYTHON=python3.12"; \
$(PYTHON) -c 'import sys; sys.exit(not getattr(sys, "_is_gil_enabled", lambda: True)())' || \
	fail "$(PYTHON) runs without its global lock, which pymirror rests on; name another: make PYTHON=python3.12"; \
$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	fail "$(PYTHON) has no venv with pip; on Debian and Ubuntu: apt install python3-venv"; \
command -v $(firstword $(CC)) >/dev/null || fail "no C compiler ($(CC)); on Debian and Ubuntu: apt install gcc libc6-dev"; \
test -e "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" || \
	fail "no Python.h for $(PYTHON); on Debian and Ubuntu: apt install python3-dev"
endef
