# Two commands do everything on a fresh machine:  make finetune   and   make test
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The newest PyTorch that fastvit is tested with. Set TORCH= to keep or choose another build.
TORCH ?= torch==2.13.0

.DEFAULT_GOAL := help
.PHONY: help setup finetune test compat lint format typecheck benchmark gpu kernels-report clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

setup: $(VENV)/.ready  ## make the virtual environment with everything in it

$(VENV)/.ready: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(if $(TORCH),$(BIN)/python -m pip install --quiet "$(TORCH)")
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

finetune: setup  ## fine-tune: ViT on pictures of leaves (ARGS="--dataset beans ..." for others)
	$(BIN)/fastvit finetune $(if $(ARGS),$(ARGS),--dataset generated --output-dir runs/leaves --overwrite)

test: setup  ## run the tests, a process for each core (ARGS="-n 0 tests/test_ops.py" for some of them in one)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

compat: setup  ## run transformers' own ViT tests on fastvit, beside transformers (fetches its source distribution)
	FASTVIT_TRANSFORMERS_TESTS="$$($(BIN)/python tests/compat/fetch.py)" $(BIN)/python -m pytest tests/compat $(ARGS)

lint: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## let ruff rewrite the code's layout
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: setup  ## time fastvit beside its rivals on this machine (ARGS="model --quick", "compare A B", ...)
	$(BIN)/fastvit benchmark $(ARGS)

# Needs no setup: on a machine that is lent for minutes, the source tree and python3's PyTorch are all there is.
gpu:  ## a GPU's first ten minutes: right numbers, races, records, speeds (OUT=folder ARGS="--only correctness")
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu $(or $(OUT),runs/gpu) $(ARGS)

kernels-report: setup  ## compile every kernel for real GPUs (none needed) and write registers, spills, instructions
	$(BIN)/python tests/compile/compile_kernels.py $(ARGS)

clean:  ## remove the virtual environment, caches and runs
	rm -rf $(VENV) build dist *.egg-info .compat_cache .pytest_cache .ruff_cache .mypy_cache .benchmarks runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
