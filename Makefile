# `make help` lists the targets; each sets up .venv on first use.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
EXTRAS := test
PYTHON_NEWEST ?= $(shell for python in python3.13 python3.12 "$$HOME"/.pyenv/versions/3.1[23].*/bin/python; do \
	"$$python" -c '' 2> /dev/null && echo "$$python" && break; done)
KERNEL_TESTS := tests/pallas_kernels tests/aot tests/coding tests/quantization
ISA ?= SSE4_2 AVX2 AVX512
# Sums in XLA's programs, OpenBLAS kernels (jax's Cholesky, NumPy's products) and numba's follow the instruction set.
OPENBLAS_SSE4_2 := Nehalem
OPENBLAS_AVX2   := Haswell
OPENBLAS_AVX512 := SkylakeX
NUMBA_SSE4_2    := nehalem
NUMBA_AVX2      := haswell
NUMBA_AVX512    := skylake-avx512
GOLDEN_TESTS := tests/quantization tests/models/test_parity.py tests/pallas_kernels/test_upstream_vectors.py \
	tests/inference/test_generate.py tests/compression/test_compress.py
GOLDEN_CHOSEN := -k '(gptq or golden_digits or factorization or rate_zero or nearest or hessian or grids or hugging or \
	flaxformer or upstream or digit) and not (beyond_capacity or beats or stay or contract or kind)'
export JAX_PLATFORMS ?= cpu

.PHONY: help demo check test fuzz test-isa test-wheel test-newest test-kernels gpu format hooks clean

help:  ## list the targets
	@sed -n 's/^\([a-z][a-z-]*\):[^#]*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(VENV)/.installed  ## compress a trained model, evaluate it, write a report with plots
	$(BIN)/python experiments/compress_c2048.py

check: $(VENV)/.installed-test  ## lint, types and fast tests: under a minute
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile -m fast

test: $(VENV)/.installed-test $(VENV)/cuda-plugin  ## lint, types and all tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

test-isa: $(addprefix test-isa-,$(ISA))  ## golden and parity tests on other instruction sets (ISA=SSE4_2, AVX2, AVX512)

test-isa-%: $(VENV)/.installed-test
	@if [ $* = AVX512 ] && ! grep -qw avx512bw /proc/cpuinfo; then echo "test-isa: this CPU has no AVX-512: skipped"; \
	else set -x; XLA_FLAGS="$$XLA_FLAGS --xla_cpu_max_isa=$*" OPENBLAS_CORETYPE=$(OPENBLAS_$*) \
		NUMBA_CPU_NAME=$(NUMBA_$*) NUMBA_CPU_FEATURES= \
		$(BIN)/python -m pytest --numprocesses auto --dist loadfile $(GOLDEN_TESTS) $(GOLDEN_CHOSEN); fi

fuzz: $(VENV)/.installed-test  ## damaged files for every reader (FUZZ_SECONDS=15 per target, FUZZ_SEED=0)
	$(BIN)/python -m tests.fuzz

test-wheel:  ## build the wheel, install it in a fresh environment, use it from another directory
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet --disable-pip-version-check --upgrade . 'pytest>=8.3' 'setuptools>=77'
	rm -rf build
	.venv-wheel/bin/python -m pytest -q -o addopts= --import-mode=importlib --noconftest tests/test_wheel.py

test-newest:  ## kernel tests on the newest supported jax, and with jax-triton
ifeq ($(PYTHON_NEWEST),)
	@echo "test-newest: skipped: neither python3.13 nor python3.12 is here (PYTHON_NEWEST=... names one)"
else
	$(MAKE) test-kernels PYTHON=$(PYTHON_NEWEST) VENV=.venv-newest
	$(MAKE) test-kernels PYTHON=$(PYTHON_NEWEST) VENV=.venv-jax-triton EXTRAS=test,jax-triton \
		KERNEL_TESTS='tests/aot $(addprefix tests/pallas_kernels/test_,backend.py jax_triton.py lowering.py)'
endif

test-kernels: $(VENV)/.installed-test $(VENV)/cuda-plugin
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile $(KERNEL_TESTS)

# On a machine with a GPU and a Python that has jax for CUDA, flax, numba, orbax, pytest and the rest of pyproject's
# dependencies: nothing is installed. Results go to $$OUT or benchmarks/results, named after the device.
gpu: ON_GPU := env -u JAX_PLATFORMS $(PYTHON)
gpu:  ## tests and benchmarks on a GPU; installs nothing
	$(ON_GPU) -m pytest -q -ra -o addopts= -W default -m gpu tests/pallas_kernels/test_gpu.py
	$(ON_GPU) -m benchmarks.kernels --minutes 2.5
	$(ON_GPU) -m benchmarks.end_to_end_gpu

format: $(VENV)/.installed-test  ## format the code, fix what the linter can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

hooks: $(VENV)/.installed-test  ## install the pre-commit hooks
	$(BIN)/pre-commit install

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[plots]'
	touch $@

$(VENV)/.installed-test: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	touch $(VENV)/.installed $@

# XLA's compiler for NVIDIA GPUs, 400 MB, which needs none. It lies outside site-packages, where jax on the CPU would
# load it; where it cannot be downloaded, the tests that compile for an H100 are skipped and say so.
$(VENV)/cuda-plugin: $(VENV)/.installed-test
	version=$$($(BIN)/python -c 'import importlib.metadata; print(importlib.metadata.version("jax"))') && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $@ \
		jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version && touch $@ || \
	{ rm -rf $@; echo "make: no compiler for GPUs ($@): tests that need it will be skipped" >&2; }

clean:  ## remove environments and results
	rm -rf $(VENV) .venv-newest .venv-jax-triton .venv-wheel runs
