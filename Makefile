# make demo    train a small Llama over two sequence-parallel ranks beside its unsharded self, and compare the losses
# make test    every capability, on a sample of the architectures, much of it at P = 2
# make test-all    every test that needs no GPU, hours of them
# make test-cuda    what needs a GPU
# make lint    ruff and mypy
# make examples    the demo and the other examples
# make sweep   every text architecture of transformers, whole and sharded; ARGS="--again refused" repeats those
#
# Each sets up .venv on first use, and again when pyproject.toml or constraints.txt changes.

PYTHON ?= python3
OMP_NUM_THREADS ?= 1
export OMP_NUM_THREADS

RANKS ?= 2
ARGS ?=
PYTEST ?=
# Files of tests that run side by side: much of a test is one process that the others wait for.
WORKERS ?= 2

BIN := .venv/bin
INSTALLED := .venv/.installed
TORCHRUN := $(BIN)/torchrun --standalone --nproc-per-node $(RANKS)

.PHONY: demo test test-all test-cuda lint examples sweep clean

demo: $(INSTALLED)
	$(TORCHRUN) examples/train_long_context.py $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST)

test-all: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m 'not cuda' $(PYTEST)

test-cuda: $(INSTALLED)
	$(BIN)/python -m pytest -m cuda tests/test_cuda.py $(PYTEST)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

examples: $(INSTALLED) demo
	$(TORCHRUN) examples/quickstart.py
	$(TORCHRUN) examples/compile_model.py
	$(TORCHRUN) examples/migrate_from_deepspeed.py
	$(TORCHRUN) examples/deepspeed_zero.py
	$(TORCHRUN) examples/custom_attention.py

sweep: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python -m surgery sweep $(ARGS)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info
