PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OLIVE := .venv-olive/bin/python
TARGETS ?= openvino,iree,coreml,torch
MODELS ?= moving-digits,digits-vit,taef2
CHECKPOINT := tests/checkpoints/moving-digits
# One thread a worker: workers that each take every core slow one another down.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all lint format results bench bench-lora bench-caching bench-pruning bench-quantization bench-int8 bench-mobilevd bench-targets bench-gpu test-targets wheel clean

help:  ## Show what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(STAMP)  ## Create .venv and install optpass with everything the tests need

# torch first and alone: a resolver that sees an open range takes a build with gigabytes of CUDA packages.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "optpass needs Python 3.11 or newer: make PYTHON=/path/to/python $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	# timm asks for torchvision, whose wheel loads on no CPU build of torch; nothing of ours needs it.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps timm
	touch $(STAMP)

demo: $(STAMP)  ## A trained video-diffusion checkpoint becomes an ONNX Runtime engine, with a report
	$(BIN)/optpass apply moving-digits $(CHECKPOINT) --out out/moving-digits --force
	$(BIN)/optpass run out/moving-digits --samples 10 --out out/moving-digits-samples --force

lint: $(STAMP)  ## Ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint  ## Everything that must hold before a commit
	$(PYTEST) -m 'not slow'

test-all: lint  ## The same and what takes minutes or full-size models
	$(PYTEST)

results: $(STAMP)  ## Regenerate docs/results: the published counts, printed by the commands themselves
	$(BIN)/python docs/results/regenerate.py

bench: $(STAMP)  ## Full-size checkpoints: time, memory and growth; writes docs/results/scale.md (12 GB of disk)
	$(BIN)/python tests/benchmarks/scale.py --out docs/results/scale.md

bench-lora: $(STAMP)  ## merge-lora beside peft on SD 1.5; writes docs/results/merge-lora.md (12 GB of disk)
	$(BIN)/python tests/benchmarks/merge_lora.py --out docs/results/merge-lora.md

bench-caching: $(STAMP)  ## cache-features beside DeepCache on moving-digits; writes docs/results/caching.md
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[peers]'
	$(BIN)/python tests/benchmarks/caching.py --out docs/results/caching.md

bench-pruning: $(STAMP)  ## prune-channels beside Torch-Pruning, quality of moving-digits; writes docs/results/pruning.md
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[peers]'
	$(BIN)/python tests/benchmarks/pruning.py --out docs/results/pruning.md

# Olive's pins are not ours.
$(OLIVE):
	$(PYTHON) -m venv $(dir $(OLIVE))..
	$(OLIVE) -m pip install --quiet --constraint constraints.txt torch
	$(OLIVE) -m pip install --quiet olive-ai==0.13.0 onnxruntime onnx onnxscript requests

bench-quantization: $(STAMP) $(OLIVE)  ## int8 beside NNCF, quantize_static and Olive on this CPU; writes docs/results/quantization.md
	OPTPASS_OLIVE=$(OLIVE) $(BIN)/python tests/benchmarks/quantization.py --out docs/results/quantization.md

bench-int8: $(STAMP)  ## moving-digits in int8, alone and with Clockwork; writes docs/results/int8-digits.md
	$(BIN)/python tests/benchmarks/int8_digits.py --out docs/results/int8-digits.md

bench-mobilevd: $(STAMP)  ## MobileVD's ladder on moving-digits, trained to one step; writes docs/results/mobilevd-digits.md (hours)
	$(BIN)/python tests/benchmarks/mobilevd_digits.py --out docs/results/mobilevd-digits.md

bench-targets: $(STAMP)  ## What every target that is installed makes of the same models; writes docs/results/targets.md
	$(BIN)/python tests/benchmarks/targets.py --targets $(TARGETS) --models $(MODELS) --out docs/results/targets.md

test-targets: $(STAMP)  ## Tests of the targets that make test skips; installs what the registry has
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[targets]'
	$(BIN)/python -m pytest -m 'not slow' tests/targets tests/cli/test_targets.py

bench-gpu: $(STAMP)  ## Denoisers on CUDA beside PyTorch's own ways; writes docs/results/gpu.md (exit 3 without a GPU)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[peers]'
	$(BIN)/python tests/benchmarks/gpu.py --out docs/results/gpu.md

format: $(STAMP)  ## Format in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(STAMP)  ## Build the wheel into dist/
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean:  ## Remove what make made, the virtual environment included
	rm -rf $(VENV) out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
