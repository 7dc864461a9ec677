"""Reads a checkpoint's configuration and checks that its weights are complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from molmo_edge.checkpoint_files import read_json, weight_files
from molmo_edge.errors import ModelError


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint directory. Raises ModelError when missing or broken."""
    return read_json(folder / "config.json")


def check_weights(folder: Path) -> None:
    """Raises ModelError unless every weight file that the checkpoint names is there."""
    if not weight_files(folder):
        raise ModelError(f"'{folder}' contains no *.safetensors weights. Finish the download.")
