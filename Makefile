# `make demo` runs the main job, `make test` the tests; both set up .venv when they need it.
# `make test-isa` runs the comparisons with golden data as older CPUs would compute them; ISA=AVX2 only as one of them.
# `make test-newest` runs the kernels' tests on the newest jax, and on the newest that jax-triton goes with.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
EXTRAS := test
PYTHON_NEWEST ?= $(shell for python in python3.13 python3.12 "$$HOME"/.pyenv/versions/3.1[23].*/bin/python; do \
	"$$python" -c '' 2> /dev/null && echo "$$python" && break; done)
KERNEL_TESTS := tests/pallas_kernels tests/coding tests/quantization
ISA ?= SSE4_2 AVX2 AVX512
# The sums of XLA's programs, of OpenBLAS' kernels (jax's Cholesky, NumPy's products) and of numba's follow the CPU.
OPENBLAS_SSE4_2 := Nehalem
OPENBLAS_AVX2   := Haswell
OPENBLAS_AVX512 := SkylakeX
NUMBA_SSE4_2    := nehalem
NUMBA_AVX2      := haswell
NUMBA_AVX512    := skylake-avx512
GOLDEN_TESTS := tests/quantization tests/models/test_parity.py tests/pallas_kernels/test_upstream_vectors.py \
	tests/inference/test_generate.py tests/compression/test_pipeline.py
GOLDEN_CHOSEN := -k '(gptq or golden_digits or factorization or rate_zero or nearest or hessian or grids or hugging or \
	flaxformer or matvec or linear or digit or losses) and not (beyond_capacity or beats or stay or contract or kind)'
export JAX_PLATFORMS ?= cpu

.PHONY: demo test test-isa test-newest test-kernels gpu lint clean

demo: $(VENV)/.installed
	$(BIN)/python experiments/compress_c2048.py

test: $(VENV)/.installed-test $(VENV)/cuda-plugin
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

# The last of them stands for AVX-512 and needs a CPU that has it; where it does not, it is left out.
test-isa: $(addprefix test-isa-,$(ISA))

test-isa-%: $(VENV)/.installed-test
	@if [ $* = AVX512 ] && ! grep -qw avx512bw /proc/cpuinfo; then echo "test-isa: this CPU has no AVX-512: skipped"; \
	else set -x; XLA_FLAGS="$$XLA_FLAGS --xla_cpu_max_isa=$*" OPENBLAS_CORETYPE=$(OPENBLAS_$*) \
		NUMBA_CPU_NAME=$(NUMBA_$*) NUMBA_CPU_FEATURES= \
		$(BIN)/python -m pytest --numprocesses auto --dist loadfile $(GOLDEN_TESTS) $(GOLDEN_CHOSEN); fi

test-newest:
ifeq ($(PYTHON_NEWEST),)
	@echo "test-newest: skipped: neither python3.13 nor python3.12 is here (PYTHON_NEWEST=... names one)"
else
	$(MAKE) test-kernels PYTHON=$(PYTHON_NEWEST) VENV=.venv-newest
	$(MAKE) test-kernels PYTHON=$(PYTHON_NEWEST) VENV=.venv-jax-triton EXTRAS=test,jax-triton \
		KERNEL_TESTS='$(addprefix tests/pallas_kernels/test_,backend.py deviceless.py jax_triton.py lowering.py)'
endif

test-kernels: $(VENV)/.installed-test $(VENV)/cuda-plugin
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile $(KERNEL_TESTS)

# On a machine with a GPU and a Python that has jax for CUDA, flax, numba, orbax, pytest and the rest of pyproject's
# dependencies: nothing is installed. Results go to $$OUT or benchmarks/results, named after the device.
gpu: export PYTHONPATH := .
gpu: ON_GPU := env -u JAX_PLATFORMS $(PYTHON)
gpu:
	$(ON_GPU) -m pytest -q -ra -o addopts= -W default -m gpu tests/pallas_kernels/test_gpu.py
	$(ON_GPU) benchmarks/kernels.py --minutes 2.5
	$(ON_GPU) benchmarks/end_to_end_gpu.py

lint: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
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

clean:
	rm -rf $(VENV) .venv-newest .venv-jax-triton runs
