# Two commands do everything on a fresh machine:  make finetune   and   make test
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The newest PyTorch that fastvit is tested with. Set TORCH= to keep or choose another build.
TORCH ?= torch==2.13.0

# An environment with the oldest PyTorch, Triton and transformers that pyproject.toml allows, 5 GB. It is kept between
# runs, and holds no fastvit: tests take that of the tree. Of the tests those that such versions can break: kernels, the
# model, other libraries' models, operators, benchmarks; tests/compile asks for this environment by itself.
OLDEST ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/fastvit-oldest
OLDEST_TESTS := $(wildcard $(patsubst %,tests/test_%.py, attention* layer_norm* gelu linear feed_forward patch_embed* \
	quantize* bounds tuning* operators ops modeling eager drop_in optimize* benchmarks \
	finetune folding))

.DEFAULT_GOAL := help
.PHONY: help setup setup-oldest finetune finetune-beans test test-oldest compat real-weights lint format docs notebooks \
	benchmark gpu kernels-report mutate-masks clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

setup: $(VENV)/.ready  ## make the virtual environment; make test adds what only tests need

$(VENV)/.ready: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(if $(TORCH),$(BIN)/python -m pip install --quiet "$(TORCH)")
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

# Packages that only tests use, which `make finetune` need not download. timm without torchvision: its published builds
# fail to import beside a CPU build of PyTorch, and transformers would import it wherever it is installed. The tests
# import timm without it (tests/timm_import.py).
$(VENV)/.interop: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --editable ".[interop]"
	$(BIN)/python -m pip install --quiet --no-deps "timm>=1.0.20"
	@touch $@

finetune: setup  ## fine-tune: a ViT on drawn leaves (ARGS="--dataset beans ..." for others)
	$(BIN)/fastvit finetune $(if $(ARGS),$(ARGS),--dataset generated --output-dir runs/leaves --overwrite)

# The data are checked first: the environment and the weights take minutes to fetch.
finetune-beans:  ## fine-tune a trained DINOv2-small on the beans photographs in FASTVIT_BEANS_DIR; 15 minutes on 2 cores
	@test -d "$(FASTVIT_BEANS_DIR)/train" || { echo "FASTVIT_BEANS_DIR: expected a folder with train/CLASS/*.jpg and \
	validation/CLASS/*.jpg, such as the images of AI-Lab-Makerere/beans; got '$(FASTVIT_BEANS_DIR)'" >&2; exit 1; }
	$(MAKE) --no-print-directory real-weights
	@echo "fine-tuning DINOv2-small (22 M parameters) with the default recipe; an interrupted run continues"
	$(BIN)/fastvit finetune --model "$$($(BIN)/python tests/real_weights.py)" --image-size 224 --resume \
		--data-dir "$(FASTVIT_BEANS_DIR)" --output-dir runs/beans-dinov2 $(ARGS)

test: $(VENV)/.interop  ## run the tests, a process for each core (ARGS="-n 0 tests/test_ops.py" for some of them in one)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

setup-oldest:  ## make another environment, with the oldest PyTorch, Triton and transformers that are supported
	@wanted="$$($(PYTHON) .ci/oldest.py)" && if [ "$$(cat $(OLDEST)/.ready 2>/dev/null)" != "$$wanted" ]; then \
		rm -rf $(OLDEST) && $(PYTHON) -m venv $(OLDEST) && \
		$(OLDEST)/bin/python -m pip install --quiet --upgrade pip && \
		$(OLDEST)/bin/python -m pip install --quiet $$wanted && \
		echo "$$wanted" > $(OLDEST)/.ready; \
	fi

test-oldest: setup-oldest  ## run the tests that the oldest versions can break, on them
	OMP_NUM_THREADS=1 PYTHONPATH="$(CURDIR)" $(OLDEST)/bin/python -m pytest -n auto --dist loadfile \
		--no-loadscope-reorder $(or $(ARGS),$(OLDEST_TESTS))

compat: setup  ## run transformers' own ViT tests on fastvit, beside transformers (fetches its source distribution)
	FASTVIT_TRANSFORMERS_TESTS="$$($(BIN)/python tests/compat/fetch.py)" $(BIN)/python -m pytest tests/compat $(ARGS)

real-weights: $(VENV)/.interop  ## fetch trained weights for the tests: a DINOv2-small, 190 MB in the user's cache
	$(BIN)/python tests/real_weights.py

lint: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## let ruff rewrite the code's layout
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup  ## build the documentation site into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

notebooks: setup  ## run the notebooks of docs/learn and save their outputs in place (ARGS="1 2" for some of them)
	$(BIN)/python tests/notebooks.py $(ARGS)

benchmark: setup  ## time fastvit beside its rivals on this machine (ARGS="model --quick", "compare A B", ...)
	$(BIN)/fastvit benchmark $(ARGS)

# Needs no setup: on a machine that is lent for minutes, the source tree and python3's PyTorch are all there is.
gpu:  ## a GPU's first ten minutes: right numbers, races, records, speeds (OUT=folder ARGS="--only correctness")
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu $(or $(OUT),runs/gpu) $(ARGS)

kernels-report: setup setup-oldest  ## compile every kernel for real GPUs (none needed), with both Tritons; see docs
	$(BIN)/python tests/compile/compile_kernels.py $(ARGS)
	PYTHONPATH="$(CURDIR)" $(OLDEST)/bin/python tests/compile/compile_kernels.py $(ARGS)

mutate-masks: setup  ## take masks out of the kernels, one at a time, and see a test fail (ARGS="--sample 40")
	$(BIN)/python tests/mutate_masks.py $(ARGS)

clean:  ## remove the virtual environment, caches and runs
	rm -rf $(VENV) build dist *.egg-info .compat_cache .pytest_cache .ruff_cache .mypy_cache .benchmarks runs site
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
