#!/usr/bin/env bash
# Create a virtual environment with vLLM's CPU build and an editable molmo_edge.
# Usage: scripts/cpu_env.sh DIRECTORY; PYTHON, TORCH and TORCH_CPU_INDEX come from the Makefile.
set -euo pipefail
venv=$1
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "molmo_edge needs Python 3.11 or newer; call make with PYTHON=/path/to/it" >&2
    exit 1
}
[ -x "$venv/bin/python" ] || "$PYTHON" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install --quiet --upgrade pip

has_torch() { "$venv/bin/python" -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$TORCH')" 2>/dev/null; }
echo "Installing torch $TORCH for the CPU …"
has_torch ||
    pip install --quiet "torch==$TORCH+cpu" 2>/dev/null ||
    pip install --quiet "torch==$TORCH+cpu" --index-url "$TORCH_CPU_INDEX" 2>/dev/null ||
    pip install --quiet "torch==$TORCH"

echo "Installing molmo_edge with vLLM's CPU build (a few minutes the first time) …"
pip install --quiet -e ".[cpu,video,plot,label,ray,kanoa,openai,dev]"
# PyPI's builds of these need CUDA torch: beside CPU torch they fail at import and break
# transformers' image modules. CPU builds import, and stay.
for package in torchvision torchaudio torchcodec; do
    "$venv/bin/python" -c "import $package" 2>/dev/null || pip uninstall --quiet --yes "$package"
done
"$venv/bin/python" -c "import torch, vllm, molmo_edge; print('ready: torch', torch.__version__)"
