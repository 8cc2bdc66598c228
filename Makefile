# Every target sets up .venv on a fresh machine, and is quick the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# cogvx with its extension and what reads and writes videos; and all that the tests need
RUNS := $(VENV)/.runs
READY := $(VENV)/.ready
PIP := python -m pip install -qq --disable-pip-version-check -c constraints.txt

# the environment's ninja and clang-format, wherever a tool looks for them
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Bytecode is kept: without it each process compiles 2 to 5 s of torch's and diffusers' modules.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help demo check fast test test-all verify bench tiny lint aot ptx mutants mutants-ptx clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/make \1\t\2/p' Makefile | expand -t 16

demo: $(RUNS)  ## what is installed, kernels against references, clips in out/demo
	cogvx-kernels doctor --short
	@echo
	cogvx-kernels verify --quick
	@echo
	cogvx demo --out out/demo --force

# one seed for all that is random in the tests; by default a new one each time
SEEDED := $(if $(SEED),--seed $(SEED))
# a process for each core, with one thread
PYTEST := OMP_NUM_THREADS=1 python -m pytest -n auto --dist worksteal $(SEEDED)

# the tests of `make check`: files that take seconds, from all parts of the project
FAST := tests/test_architecture.py tests/test_readme.py tests/kernels/test_rope3d_tables.py \
    tests/kernels/test_rope3d.py tests/model/schedulers tests/model/test_config.py \
    tests/model/test_frames.py tests/model/test_files.py tests/model/test_factorized.py \
    tests/model/test_lora.py tests/model/test_pipeline_refusals.py tests/patching/test_refusals.py
SLOW := inductor or pasted_into_a_file
check: $(READY)  ## lint, types and a fast subset of the tests, in two minutes
	$(MAKE) --no-print-directory -j2 -Otarget lint fast
fast: $(READY)
	$(PYTEST) -m 'not budget' -k 'not ($(SLOW))' $(FAST)

ifdef TRITON
# Every kernel compiled by another Triton, put before the environment's own; and interpreted: every
# sample in bf16, and random calls. Together these two sizes have every kernel. Not sm_90, where 3.6.0
# takes 185 registers for expert_adaln's backward: the budgets are for the environment's Triton.
SIDE := $(VENV)/triton-$(TRITON)
OTHERS := triton==$(TRITON)
test: $(SIDE)/.ready
	PYTHONPATH=$(CURDIR)/$(SIDE) python -c 'import triton; print("triton", triton.__version__)'
	PYTHONPATH=$(CURDIR)/$(SIDE) python -m cogvx_kernels aot --target sm_80 \
	    --size 2b-480x720-49f --size 5b-480x720-49f
	PYTHONPATH=$(CURDIR)/$(SIDE) $(PYTEST) --all --fuzz 200 \
	    tests/kernels/test_contract.py -k 'random_cases or (samples and bf16 and again)'
else ifdef DIFFUSERS
# patch and its tests on an older diffusers, with the packages it needs
SIDE := $(VENV)/diffusers-$(DIFFUSERS)
OTHERS := diffusers==$(DIFFUSERS) transformers==4.57.1 tokenizers==0.22.1 huggingface_hub==0.36.0
test: $(SIDE)/.ready
	PYTHONPATH=$(CURDIR)/$(SIDE) python -m tests.patching.without torchao --all $(SEEDED) \
	    tests/patching/test_patch.py tests/patching/test_unpatch.py \
	    tests/patching/test_refusals.py tests/patching/test_memory_and_streams.py
else
test: $(READY)  ## every test function; TRITON=3.6.0: kernels on that; DIFFUSERS=0.33.0: patch on that
	$(PYTEST) $(if $(PART),--part $(PART))
endif

test-all: $(READY)  ## every test function with all combinations of its parameters
	$(PYTEST) --all

ifdef SIDE
$(SIDE)/.ready: | $(READY)
	python -m pip install -q --no-deps --upgrade --target $(SIDE) $(OTHERS)
	touch $@
endif

verify: $(RUNS)  ## every op on every sample against its reference; ARGS="--all-rows": a table
	cogvx-kernels verify $(ARGS)

bench: $(READY)  ## the benchmark suite into out/; ARGS="--op rope3d" narrows it
	python -m benchmarks --out out $(ARGS)

tiny: $(READY)  ## train the packaged model from nothing, into runs/tiny: hours; continues where it stopped
	cogvx train tiny --out runs/tiny-first
	cogvx train cogvx/assets/tiny/refined.toml --out runs/tiny

lint: $(READY)  ## ruff, mypy, clang-format, and words that stay out
	ruff check .
	ruff format --check .
	python -m tests.lint_words
	mypy
	clang-format --dry-run --Werror csrc/*

aot: $(READY)  ## every Triton kernel through the compilers of every target; ARGS="--samples": every option
	cogvx-kernels aot $(ARGS)

ptx: $(RUNS)  ## the compiled code of every sample, executed on a CPU; ARGS="--quick": a few
	cogvx-kernels ptx $(or $(ARGS),--arch sm_80 --arch sm_90)

mutants: $(READY)  ## do the tests notice bugs that are put into kernels on purpose?
	python -m tests.mutants

mutants-ptx: $(READY)  ## does `cogvx-kernels ptx` notice bugs that are put into compiled code?
	python -m tests.ptx_mutants

clean:  ## remove all that make has made, .venv included
	rm -rf $(VENV) build out *.egg-info .mypy_cache .pytest_cache .ruff_cache .benchmarks
	rm -f cogvx_kernels/_C.*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Bytecode of torch is written when a module of it is first imported: all of it takes half a minute.
# That of the rest is written at once, for some of it cannot be compiled without a warning.
# torch comes first and pinned: the extension is built against the torch that will run it
$(RUNS): pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'installing torch and what builds against it (hundreds of MB: minutes)'
	@$(PIP) --no-compile setuptools wheel pybind11 ninja torch
	@echo 'compiling the C++ extension and installing cogvx (a minute or two)'
	@$(PIP) --no-compile --no-build-isolation -e '.[video]'
	@python -c 'import torch, cogvx_kernels._C as extension; print(extension.build_info())' || \
	    echo 'cogvx: there is no C++ extension; pip install -v --no-build-isolation -e . says why'
	touch $@

$(READY): $(RUNS)
	@echo 'installing what the tests need'
	@$(PIP) --no-build-isolation -e '.[dev]'
	touch $@
