# Every target but those for a GPU makes its own .venv from requirements-dev.txt when that is missing or out of date.
# PYTHON chooses the interpreter it is made with, ARGS goes to the program that a target runs:
#   make test ARGS="tests/ops -k moments -n 0"

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv test lint types mutations demo figures kernels check-simt check-cuda check-abi check-networks bench bench-compare gpu-check gpu-sanitize gpu-tune clean distclean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# The stamp goes first and comes back last: an interrupted or failed install is repeated, never believed.
$(STAMP): requirements-dev.txt pyproject.toml setup.py csrc/build.json normkernels/_build.py normkernels/_version.py
	@rm -f $@
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("make: expected Python 3.11 or newer for the pinned development requirements, got " + sys.version.split()[0] + "; choose one with PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	NORMKERNELS_BUILD=$${NORMKERNELS_BUILD:-auto} $(BIN)/python -m pip install --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

venv: $(STAMP) ## make the virtual environment .venv

# One thread per worker: the tests are many small ones, and two workers already fill two cores. Benchmarks
# do not run under xdist; the switch keeps pytest-benchmark from warning about that.
test: $(STAMP) ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --benchmark-disable $(ARGS)

lint: $(STAMP) ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(wildcard csrc/*.cpp csrc/*/*.c* csrc/*/*.h tests/simt/*.c* tests/simt/*.h tests/simt/device/*)
	$(BIN)/mypy

types: $(STAMP) ## check types
	$(BIN)/mypy

mutations: $(STAMP) ## by hand: put one-line mistakes into copies of the package, and see that the tests notice each
	nice $(BIN)/python -m tests.mutations.run $(ARGS)

demo: $(STAMP) ## train on real digits with each layer, measure Table A1, write plots
	$(BIN)/python -m bench.demo $(ARGS)

figures: $(STAMP) ## redraw figures of the papers, PNG and CSV, in bench/results/figures (ARGS=--quick for a try)
	$(BIN)/python -m bench.figures $(ARGS)

kernels: $(STAMP) ## compile every Triton kernel for four GPU architectures and check what it takes of them
	TRITON_INTERPRET=0 $(BIN)/python -m bench.builds.kernel_resources --check $(ARGS)

# The sanitized run, of every fourth test, lets the threads run the other way round; mutations are tested in the first.
SIMT := $(BIN)/python -m pytest -n 2 --maxschedchunk 1 --benchmark-disable tests/simt tests/ops
check-simt: $(STAMP) ## run the CUDA kernels on the CPU, also under sanitizers, and see that mistakes in them are caught
	$(BIN)/python -m tests.simt.build
	OMP_NUM_THREADS=1 $(SIMT) --simt=plain $(ARGS)
	OMP_NUM_THREADS=1 NORMKERNELS_SIMT_THREADS=descending NORMKERNELS_SIMT_BLOCKS=descending \
		$(SIMT) --simt=sanitized --part 1/4 --ignore tests/simt/test_mutations.py $(ARGS)

check-cuda: .venv-cuda/.complete ## compile the CUDA extension for three GPU architectures, list what it takes, test it
	.venv-cuda/bin/python -m bench.builds.check_cuda $(ARGS)

check-abi: ## compile the CUDA extension with torch 2.11 and load it in the newest torch
	$(PYTHON) -m bench.builds.check_abi $(ARGS)

check-networks: .venv-networks/.complete ## convert, train and fold public architectures (ARGS=--quick for a few), write docs/networks.md
	.venv-networks/bin/python -m bench.builds.check_networks $(ARGS)

# Six gigabytes. The package is not installed there: the sources at hand are what is tried.
.venv-networks/.complete: requirements-networks.txt
	@rm -f $@
	$(PYTHON) -m venv .venv-networks
	.venv-networks/bin/python -m pip install --disable-pip-version-check -r requirements-networks.txt
	@touch $@

# Five gigabytes: only where there is a compiler to use them. The package is not installed there, but found in build/.
.venv-cuda/.complete: requirements-cuda.txt
	@$(PYTHON) -c 'import runpy, sys; runpy.run_path("normkernels/_build.py")["find_nvcc"]() or sys.exit("make: expected nvcc (in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda), found none")'
	@rm -f $@
	$(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/python -m pip install --disable-pip-version-check -r requirements-cuda.txt
	@touch $@

bench: $(STAMP) ## run the benchmarks (ARGS=--quick for a short run)
	$(BIN)/python -m bench $(ARGS)

bench-compare: $(STAMP) ## compare the speed of our ops and layers with that of BASE=commit
	@test -n "$(BASE)" || { echo "make bench-compare: expected BASE=ref, a commit, branch or tag, got none" >&2; exit 2; }
	$(BIN)/python -m bench.micro.compare --base "$(BASE)" $(ARGS)

# The GPU targets use $(PYTHON) with what it has instead of .venv: they run on machines that have no network.
gpu-check: ## install, test and measure on a machine with a GPU, the report in OUT=dir
	@test -n "$(OUT)" || { echo "make gpu-check: expected OUT=dir, the folder for the report, got none" >&2; exit 2; }
	$(PYTHON) -m bench.gpu.gpu_check --out "$(OUT)" $(ARGS)

gpu-sanitize: ## run the GPU tests of the ops under compute-sanitizer (ARGS="-k moments" for others)
	PYTHON="$(PYTHON)" bench/gpu/sanitize.sh $(ARGS)

gpu-tune: ## find the fastest Triton configurations on this GPU, written to OUT=file
	@test -n "$(OUT)" || { echo "make gpu-tune: expected OUT=file, the table to write, got none" >&2; exit 2; }
	$(PYTHON) -m bench.gpu.tune --out "$(OUT)" $(ARGS)

clean: ## remove build products and caches
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f normkernels/_build_record.json normkernels/_C*.so
	find normkernels tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and remove the virtual environments too
	rm -rf $(VENV) .venv-cuda .venv-abi .venv-networks
