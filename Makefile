# `make demo` and `make test` set everything up from nothing; they need Python 3.10 to 3.13 and pip, no root and no GPU.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DATA := .data
SETS := digits fashion efficientnet photos minilm bbc vowels
CONSTRAINTS := .ci/constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test check format bench bench-int8 bench-prune schema data clean

help: ## Show what there is to make
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

# The stamp is new when the environment holds what pyproject.toml asks for
$(VENV)/.ready: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -qq --upgrade pip
	$(BIN)/pip install -qq --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $@

demo: $(VENV)/.ready ## Compile a trained digit classifier to INT8, validate it, and build a TensorRT-RTX engine too
	$(BIN)/python calibration/fetch.py digits --to $(DATA)
	rm -rf .out/digits-int8 .out/digits-int8-rtx
	$(BIN)/optkit compile --recipe recipes/digits-int8.yaml --out .out/digits-int8
	$(BIN)/optkit compile --recipe recipes/digits-int8-rtx.yaml --out .out/digits-int8-rtx

data: $(VENV)/.ready ## Fetch every model and data set that the tests and benchmarks use (about 150 MB)
	$(BIN)/python calibration/fetch.py $(SETS) --to $(DATA)
	$(BIN)/python examples/models/prepare.py digits fashion efficientnet bbc --data $(DATA)

# Every test computes on one thread, so two run side by side
test: export OMP_NUM_THREADS = 1
test: data ## Run the tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: $(VENV)/.ready ## Lint, format check, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: data ## Compare with onnxruntime.quantization on the same models, data and runtime
	$(BIN)/python benchmarks/int8_vs_ort.py --out .out/bench

bench-int8: data ## INT8 beside onnxruntime.quantization, NNCF and ModelOpt: accuracy, speed, cost (hours)
	$(BIN)/python calibration/fetch.py words vowels --to $(DATA)
	$(BIN)/python benchmarks/int8/run.py
	$(BIN)/python benchmarks/int8/calibration.py

bench-prune: data ## What pruning loses and gains on ResNet8 without training: 2:4, channels, measured speed
	$(BIN)/python benchmarks/prune/run.py

schema: $(VENV)/.ready ## Write the JSON schema of recipes for editors
	$(BIN)/optkit recipe schema > recipes/schema.json

clean: ## Remove the environment, the data and every output
	rm -rf $(VENV) $(DATA) .out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
