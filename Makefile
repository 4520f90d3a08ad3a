# make demo   train, evaluate and use a detector on generated images, from nothing
# make test   everything that must hold: style, types, tests
# make bench  every benchmark, small and short: do they run, and are all results right?
PYTHON ?= python3
BIN := .venv/bin

SOURCES := $(wildcard csrc/* csrc/cpu/* csrc/cuda/*)
FORMATTED := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/* \
                        tests/simt/*.h tests/simt/*.cpp tests/simt/include/* \
                        tests/cuda_gates/planted/*)

.PHONY: demo test bench check format abi gates clean

# An environment of its own: torch and torchvision from the package index, then this project, built
# against that torch.
.venv/installed: setup.py pyproject.toml $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed: make PYTHON=python3.12 ..." \
	    if sys.version_info < (3, 10) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch torchvision
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	$(BIN)/fcos env
	@touch $@

demo: .venv/installed
	$(BIN)/python -m fcos.data.shapes --output demo/shapes --train 600 --val 120
	rm -rf demo/run demo/predictions
	$(BIN)/fcos train tiny --train.output demo/run \
	    --data.train-annotations demo/shapes/train.json \
	    --data.val-annotations demo/shapes/val.json \
	    --data.min-sizes 192 --data.max-size 288
	$(BIN)/fcos eval demo/run/best.pt --output demo/evaluation
	$(BIN)/fcos predict demo/run/best.pt 'demo/shapes/images/val-0000*.png' --output demo/predictions
	@echo 'Look at demo/run/val_predictions.jpg, demo/run/results.png and demo/predictions/'

test: check
	$(BIN)/python -m pytest

# Writes nothing; `fcos bench` without --quick measures.
bench: .venv/installed
	timeout 300 $(BIN)/fcos bench --quick

check: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(FORMATTED)

# The libraries built under one torch work under another. Not part of `make test`: it installs a
# second torch.
abi: .venv/installed
	test -x .venv-abi/bin/python || $(PYTHON) -m venv .venv-abi
	.venv-abi/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
	PYTHONPATH=. .venv-abi/bin/python tests/abi/check_second_torch.py

# Registers, memory and machine code of the CUDA kernels for every GPU generation, not only the two
# of `make test`. Needs nvcc, no GPU.
gates: .venv/installed
	$(BIN)/python -m tests.cuda_gates --all

clean:
	rm -rf build demo .cache/cuda_gates .venv .venv-abi fcos_ext/*.so fcos_ext/_build_info.json *.egg-info
