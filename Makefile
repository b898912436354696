# `make` lists the targets. Everything is installed into .venv, which is made with $(PYTHON).
# A PYTHON given by you that already has torch is used as it is instead: nothing is downloaded,
# and only this package is installed into it.

PYTHON ?= python3
TORCH ?= torch==2.13.0
CPU_INDEX := https://download.pytorch.org/whl/cpu
# The CPU build of torch comes without Triton, whose interpreter the tests use; this one pairs with
# the torch above.
TRITON ?= triton==3.7.1
# Libraries whose models the tests convert, and torchao, which prepares captured ones for quantisation.
# Those in the second line go in without their dependencies, which are not needed and some of which
# would replace torch.
MODELS ?= timm==1.0.31 transformers==5.23.0
MODELS_ALONE ?= torchvision==0.28.0 monai==1.6.1 segmentation-models-pytorch==0.6.0 \
	torchao==0.18.0
# A CUDA compiler from PyPI, where `make test` finds none: the kernels are compiled, and run on the
# CPU, on machines without a GPU too. Beside a torch with CUDA libraries it has to be of their release.
NVCC ?= nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 \
	nvidia-cuda-cccl==13.0.85 nvidia-cuda-runtime==13.0.96
VENV := .venv
export SENET_KERNELS_BUILD ?= auto
# The gate tests the native kernels; that they were not built is a failure unless asked for.
export SENET_KERNELS_REQUIRE_NATIVE ?= $(if $(filter python,$(SENET_KERNELS_BUILD)),0,1)

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
# `time` ends every stage with a line of this form.
export TIMEFORMAT := <== %1R s
PIP := -m pip --disable-pip-version-check install -qq -c .ci/constraints.txt

# Ninja has no use for make's jobserver, whose descriptors it does not get.
BUILD = env -u MAKEFLAGS $(PY)

CSRC := $(shell find csrc -type f 2>/dev/null)
CPP_FILES := $(filter %.h %.cuh %.cpp %.cu,$(CSRC) $(shell find tests/simt tests/ptx tests/team tests/arm64 examples -type f 2>/dev/null))
STAMPS := $(VENV)/stamps

GIVEN := $(filter command environment,$(firstword $(origin PYTHON)))
# For gpu it is used as it is: torch is imported within the budget, and a stage says where it fails.
ifneq ($(and $(GIVEN),$(filter gpu,$(MAKECMDGOALS))),)
PY := $(PYTHON)
READY_GPU :=
else ifneq ($(and $(GIVEN),$(shell $(PYTHON) -c 'import torch; print(1)' 2>/dev/null)),)
PY := $(PYTHON)
READY_BENCH := given-python
READY_TEST := given-python
READY_GPU :=
READY_MODELS :=
else
PY := $(VENV)/bin/python
READY_BENCH := $(STAMPS)/bench
READY_TEST := $(STAMPS)/test
READY_GPU := $(STAMPS)/bench $(STAMPS)/test
READY_MODELS := $(STAMPS)/models
endif
FOR_MODELS := $(if $(filter models,$(ARGS)),$(READY_MODELS))
OUT ?= build/gpu
WORKERS ?= 2
BUDGET ?= 455
DEVICE ?= cuda
BUNDLE ?= build/gpu-bundle.tgz

.PHONY: help bench build docs fuzz gpu gpu-bundle sanitize mutants reliability test test-all lint format clean \
	library given-python FORCE

help:  ## this list
	@echo 'Targets:'
	@sed -n 's/^\([a-z-]*\):[^#]*## /  \1\t/p' Makefile | expand -t 14
	@echo 'Variables:'
	@echo '  PYTHON=...  interpreter for $(VENV); one that has torch is used directly'
	@echo '  TORCH=...   what pip installs as torch (default $(TORCH))'
	@echo '  ARGS=...    arguments for the benchmarks, for pytest, or for gpu (--only layers)'
	@echo '  WORKERS=... processes that share the tests (default $(WORKERS); 0: this one alone)'
	@echo '  OUT=...     folder for the gpu.tgz of gpu (default $(OUT))'
	@echo '  BUDGET=...  seconds for gpu and fuzz (default $(BUDGET))'
	@echo '  DEVICE=cpu  a dry run of gpu: every stage, with a small task for the CPU'
	@echo '  SENET_KERNELS_BUILD=auto|python|cpu|cuda, see setup.py'

bench: $(READY_BENCH) $(FOR_MODELS)  ## install what is needed, run the benchmarks
	@echo '==> benchmarks'; time $(PY) -m benchmarks $(ARGS)

# Builds what it needs itself, as one of its stages, and installs nothing into a PYTHON given. Without
# make: python3 -m tools.gpu --out FOLDER.
gpu: $(READY_GPU)  ## try, time and check the kernels on this machine's GPU; no network needed
	@$(PY) -m tools.gpu --out '$(OUT)' --budget '$(BUDGET)' --device '$(DEVICE)' $(ARGS)

gpu-bundle: $(READY_BENCH)  ## all of this as one file, for a machine with a GPU, torch and Triton
	@$(MAKE) --no-print-directory '$(BUNDLE)'

# With the library that is here, which any torch from 2.11 on and any Python loads; of results what the
# report compares with; and the commit, for records made where there is no git. It has to travel in
# 64 MiB.
$(BUNDLE): FORCE
	@ls senet_kernels/_native*.so >/dev/null
	@[[ '$(SENET_KERNELS_BUILD)' != auto ]] || grep -q '"cuda": "' senet_kernels/_build.json || \
	  { echo 'the library has no CUDA kernels: install nvcc and build again (make build), or say' \
	    'SENET_KERNELS_BUILD=cpu' >&2; exit 1; }
	@mkdir -p '$(@D)' build/bundle; \
	  { git describe --always --abbrev=40 --exclude='*' --dirty 2>/dev/null || cat COMMIT 2>/dev/null || :; } \
	  > build/bundle/COMMIT; tar czf '$@' --exclude=__pycache__ --exclude='benchmarks/results/[!c]*' \
	  --exclude='benchmarks/results/c[!o]*' --transform 's,^,senet_kernels/,' senet_kernels benchmarks \
	  tools tests csrc Makefile setup.py pyproject.toml LICENSE README.md -C build/bundle COMMIT
	@size=$$(stat -c %s '$@'); echo "$@: $$size bytes"; \
	  (( size < 64 << 20 )) || { echo 'expected less than 64 MiB' >&2; exit 1; }

test: $(READY_TEST)  ## lint, docs, and the tests that need no GPU and no patience
	@stages=; \
	if $(call missing,ruff mypy clang_format); then stages+=' lint'; \
	else echo '==> lint: left out, see above'; fi; \
	if $(call missing,sphinx myst_parser furo); then stages+=' docs'; \
	else echo '==> docs: left out, see above'; fi; \
	[[ -z "$$stages" ]] || $(MAKE) --no-print-directory -j2 --output-sync=target $$stages
	@echo '==> tests'; time $(PYTEST) -m 'not slow and not gpu' $(ARGS)
	@if $(call missing,triton); then echo "==> tests in Triton's interpreter"; \
	  time TRITON_INTERPRET=1 $(PYTEST) -m 'not slow and not gpu' $(ARGS); fi

test-all: $(READY_TEST)  ## all tests, the slow ones and those for a GPU too
	@echo '==> all tests'; time $(PYTEST) $(ARGS)
	@if $(call missing,triton); then echo "==> all tests in Triton's interpreter"; \
	  time TRITON_INTERPRET=1 $(PYTEST) -m 'not gpu' $(ARGS); fi

fuzz: $(READY_TEST)  ## random calls of every backend for BUDGET seconds
	@echo '==> fuzz'; time $(PY) tests/fuzz.py --seconds '$(BUDGET)' $(ARGS)

# ARGS=--record writes what they say to docs/sanitizers.json and the page made of it.
sanitize: $(READY_TEST)  ## the native CPU code under sanitizers and valgrind, where there are
	@echo '==> sanitize'; time $(PY) -m tools.sanitize $(ARGS)

# ARGS="--only ID" runs one again, ARGS="--seed 2" draws others.
mutants: $(READY_TEST)  ## change the kernels at random places: does the suite notice? (an hour and more)
	@echo '==> mutants'; time $(PY) -m tools.mutate $(ARGS)

reliability: $(READY_TEST)  ## run what docs/reliability.md promises, and write the results there
	@echo '==> reliability'; time $(PY) -m tools.reliability --run $(ARGS)

lint: $(READY_TEST)  ## style and types
	@echo '==> lint'; time { \
	  $(PY) -m ruff check .; \
	  $(PY) -m ruff format --check .; \
	  $(PY) -m mypy; \
	  $(if $(CPP_FILES),$(CLANG_FORMAT) --dry-run --Werror $(CPP_FILES)); }

format: $(READY_TEST)  ## rewrite the sources in the project's style
	@echo '==> format'; time { \
	  $(PY) -m ruff check --fix-only .; \
	  $(PY) -m ruff format .; \
	  $(if $(CPP_FILES),$(CLANG_FORMAT) -i $(CPP_FILES)); }

docs: $(READY_TEST)  ## the documentation, as HTML in build/docs; a warning is an error
	@echo '==> docs'; time $(PY) -m sphinx -q -W --keep-going -b html docs build/docs

build: $(READY_TEST)  ## compile the native library in place

clean:  ## remove all that was built ($(VENV) keeps torch)
	rm -rf build dist *.egg-info senet_kernels/_native*.so senet_kernels/_build.json
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f $(STAMPS)/bench $(STAMPS)/test

# The tests by several processes, each of which begins with a part of its own.
PYTEST = $(PY) -m pytest $$($(PY) -c 'import xdist' 2>/dev/null && \
  echo '-n $(WORKERS) --dist worksteal')

# The module has no __main__, and its script need not be on PATH.
CLANG_FORMAT = $(PY) -c 'import clang_format; clang_format.clang_format()'

# Succeeds if all the modules $(1) are there, otherwise names those that are not.
define missing
$(PY) -c 'import sys; from importlib.util import find_spec as f; \
m = [n for n in sys.argv[1:] if not f(n)]; \
m and print("    not installed:", *m); sys.exit(bool(m))' $(1)
endef

$(STAMPS)/venv:
	@echo '==> $(VENV)'; time { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed")'; \
	  $(PYTHON) -m venv $(VENV); mkdir -p $(STAMPS); touch $@; }

# Without an NVIDIA driver the CPU build will do, which spares gigabytes of CUDA libraries. If its
# index cannot be reached, then PyPI has to serve.
$(STAMPS)/torch: $(STAMPS)/venv
	@echo '==> $(TORCH)'; time { \
	  if $(PY) -c 'import torch' 2>/dev/null; then echo '    already there'; \
	  elif ! command -v nvidia-smi >/dev/null && $(PY) $(PIP) --retries 0 --timeout 10 \
	    --extra-index-url $(CPU_INDEX) '$(TORCH)' 2>/dev/null; then :; \
	  else $(PY) $(PIP) '$(TORCH)'; fi; \
	  $(PY) $(PIP) 'setuptools>=77' ninja numpy; touch $@; }

# Changes whenever the choice of what to build does.
$(STAMPS)/choice: FORCE | $(STAMPS)/venv
	@new='$(SENET_KERNELS_BUILD)|$(SENET_KERNELS_CXXFLAGS)|$(SENET_KERNELS_WERROR)|$(CXX)'; \
	  [[ "$$(cat $@ 2>/dev/null)" == "$$new" ]] || echo "$$new" > $@

SOURCES := pyproject.toml .ci/constraints.txt setup.py senet_kernels/_version.py $(CSRC)

$(STAMPS)/bench: $(SOURCES) $(STAMPS)/choice | $(STAMPS)/torch
	@echo '==> senet_kernels[bench], native: $(SENET_KERNELS_BUILD)'; time { \
	  $(BUILD) $(PIP) --no-build-isolation -e '.[bench]'; cat senet_kernels/_build.json; touch $@; }

# torchvision belongs to one release of torch, and to one kind of build, which has to be of torch's
# index; and this transformers is not for Python 3.10. With others these tests are left out. Where
# torchvision does not import all the same it goes out again, and timm, which needs it, with it.
$(STAMPS)/models: tools/torchvision_ops.py | $(STAMPS)/torch
	@echo '==> model libraries for the tests'; time { \
	  if $(PY) -c 'import sys, torch; sys.exit(not torch.__version__.startswith("2.13.0") or \
	    sys.version_info < (3, 11))'; then \
	    $(PY) $(PIP) pillow numpy; \
	    index="$$($(PY) -c 'import torch; print("" if torch.version.cuda else "$(CPU_INDEX)")')"; \
	    $(PY) $(PIP) --retries 0 --timeout 10 --no-deps $${index:+--extra-index-url "$$index"} \
	      $(MODELS_ALONE) 2>/dev/null || $(PY) $(PIP) --no-deps $(MODELS_ALONE); \
	    $(PY) $(PIP) $(MODELS); \
	    $(PY) tools/torchvision_ops.py || { \
	      $(PY) -m pip uninstall -qq -y torchvision timm; \
	      echo '    torchvision and timm are left out, and the tests and examples of their models'; }; \
	  else echo '    left out: they are for torch 2.13.0 and Python 3.11 or later'; fi; touch $@; }

# Left out where nvcc is there, or nothing native is wanted; without a network, so be it.
$(STAMPS)/nvcc: | $(STAMPS)/torch
	@echo '==> CUDA compiler'; time { \
	  if [[ -n "$${CUDA_HOME:-}" ]] || command -v nvcc >/dev/null; then echo '    already there'; \
	  elif [[ '$(SENET_KERNELS_BUILD)' != auto && '$(SENET_KERNELS_BUILD)' != cuda ]]; then \
	    echo '    not wanted'; exit 0; \
	  else release="$$($(PY) -c 'import torch; print(torch.version.cuda or "")')"; wheels='$(NVCC)'; \
	    if [[ -n "$$release" ]]; then wheels="$$(sed -E "s/==[^ ]*/==$$release.*/g" <<< "$$wheels")"; fi; \
	    set -f; $(PY) $(PIP) $$wheels || echo '    not installed'; fi; touch $@; }

# What `make test` installs beside torch, from pyproject.toml.
EXTRAS := test,onnx,lint,train,docs
define requirements
$(PY) -c 'import sys; from setuptools.config.pyprojecttoml import read_configuration as read; \
extras = read("pyproject.toml")["project"]["optional-dependencies"]; \
print(*(one for name in sys.argv[1].split(",") for one in extras[name]), sep="\n")' $(EXTRAS)
endef

$(STAMPS)/packages: pyproject.toml .ci/constraints.txt | $(STAMPS)/torch $(STAMPS)/models
	@echo '==> packages for $(EXTRAS)'; time { \
	  $(PY) $(PIP) -r <($(requirements)) "$(TRITON); sys_platform == 'linux'"; touch $@; }

# While the library is compiled, packages are fetched and unpacked: pip finds it compiled.
$(STAMPS)/test: $(SOURCES) $(STAMPS)/choice tools/torchvision_ops.py | $(STAMPS)/torch $(STAMPS)/nvcc
	@$(MAKE) --no-print-directory -j2 --output-sync=target $(STAMPS)/models $(STAMPS)/packages library
	@echo '==> senet_kernels[$(EXTRAS)], native: $(SENET_KERNELS_BUILD)'; time { \
	  $(BUILD) $(PIP) --no-build-isolation -e '.[$(EXTRAS)]'; cat senet_kernels/_build.json; touch $@; }

library: | $(STAMPS)/torch $(STAMPS)/nvcc
	@echo '==> library'; time $(BUILD) setup.py -q build_ext --inplace

given-python:
	@echo '==> senet_kernels into $(PYTHON), native: $(SENET_KERNELS_BUILD)'; time { \
	  $(BUILD) $(PIP) --no-deps --no-build-isolation -e .; cat senet_kernels/_build.json; \
	  $(call missing,matplotlib numpy PIL pytest pytest_benchmark rich sklearn tqdm hypothesis triton) || \
	    echo "    some targets or reports may need them: $(PYTHON) -m pip install ..."; }
