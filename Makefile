# Each target sets up all it needs, from Python and (optionally) a C++ compiler alone.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
WORKERS := -n 2 --dist worksteal
NATIVE := find csrc -name '*.?pp' -o -name '*.cu'
SOURCES := $(shell $(NATIVE)) CMakeLists.txt setup.py pyproject.toml

.PHONY: demo test test-all lint format bench docs gpu-wheel clean

demo: $(VENV)/.installed
	$(BIN)/discedit demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest $(WORKERS) -m 'not slow'

test-all: $(VENV)/.installed
	$(BIN)/python -m pytest $(WORKERS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy discedit kernels
	$(BIN)/python tests/lint_docs.py
	{ $(NATIVE); echo tests/cuda_on_host/cuda_runtime.h; } | xargs $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	{ $(NATIVE); echo tests/cuda_on_host/cuda_runtime.h; } | xargs $(BIN)/clang-format -i

bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[bench]' --no-build-isolation
	$(BIN)/python -m benchmarks.bench_cifar --write
	$(BIN)/python -m pytest benchmarks/bench_*.py --benchmark-only -s --write-readme

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# For a GPU machine that may lack time or tools to build: both modules, for the H100's and H200's own instructions.
gpu-wheel:
	rm -rf build dist/discedit-*.whl
	DISCEDIT_BUILD=require DISCEDIT_CUDA=require CMAKE_ARGS='-DCMAKE_CUDA_ARCHITECTURES=90-real' \
	  $(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist .
	ls -l dist/*.whl

clean:
	rm -rf $(VENV) build dist site *.egg-info discedit/*.so discedit/_build.json out

# torch first: whatever is installed later then keeps this one. The extension is rebuilt when a source is newer.
$(VENV)/.installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	CMAKE_ARGS=-DDISCEDIT_WERROR=ON $(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
