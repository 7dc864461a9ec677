"""Synthetic checkpoint files, without the vision tower's weight where nobody reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from molmo_edge.devices.tensors import Tower
from molmo_edge.models.molmo import hf
from molmo_edge.models.molmo.synthetic import write_checkpoint


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of a 7B-D-like checkpoint; its tower has one block, so no engine loads it."""
    hf.register()
    return write_checkpoint(tmp_path_factory.mktemp("molmo-d"), tower=Tower(blocks=1))
