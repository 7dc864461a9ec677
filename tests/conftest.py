"""What all tests share: a clean environment, and one stub engine a session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from molmo_edge import EdgeVLM


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("MOLMO_EDGE_") and name != "MOLMO_EDGE_FUZZ_EXAMPLES":
            monkeypatch.delenv(name)
    # No .env of whoever runs the tests.
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the session's stub checkpoint lies."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def stub_vlm(cache_dir: Path) -> Iterator[EdgeVLM]:
    """The real vLLM engine on the stub; tests must leave it usable."""
    with EdgeVLM("stub", cache_dir=cache_dir, max_model_len=2048, kv_cache_memory_gb=0.25) as vlm:
        yield vlm


@pytest.fixture
def photo() -> np.ndarray:
    """A small seeded picture, H×W×3 uint8."""
    return np.random.default_rng(7).integers(0, 256, (90, 120, 3), dtype=np.uint8)
