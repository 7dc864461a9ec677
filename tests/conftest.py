"""A clean environment for every test, and the two engines of the session."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from molmo_edge import EdgeVLM
from molmo_edge.engine.fake import FakeEngine, FakeFactory
from tests.engine.support import opened


def pytest_configure() -> None:
    # A shell that starts a job in the background has it ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Processes that share the cores: OpenMP threads of one would wait for those of the other.
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.update(OMP_NUM_THREADS="1", VLLM_CPU_OMP_THREADS_BIND="nobind")


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("MOLMO_EDGE_") and name != "MOLMO_EDGE_FUZZ_EXAMPLES":
            monkeypatch.delenv(name)
    # No .env of whoever runs the tests.
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache whose stub is a tiny Molmo 2 that answers as the second stub does.

    The real stubs have the real vision tower, which takes seconds per image.
    """
    from molmo_edge.models.hub import STUB, STUBS
    from molmo_edge.models.molmo2.synthetic import hub_config, write_fixed_answer

    directory = tmp_path_factory.mktemp("cache")
    write_fixed_answer(directory / STUBS[STUB], hub_config())
    return directory


@pytest.fixture(scope="session")
def golden_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of the tiny Molmo 2 of "qwen3" or "olmo3", with known reference outputs."""
    from tests import molmo2_golden  # imports torch

    return cache(lambda name: molmo2_golden.write(tmp_path_factory.mktemp(name), name))


@pytest.fixture
def fake(request: pytest.FixtureRequest) -> FakeFactory:
    """Engines that give the `ANSWERS` of the test's module."""
    return FakeEngine.factory(request.module.ANSWERS, step_s=0.0005)


@pytest.fixture
def vlm(fake: FakeFactory) -> Iterator[EdgeVLM]:
    with opened(fake) as vlm:
        yield vlm


STUB: dict[str, Any] = {
    "model": "stub",
    "max_model_len": 2048,
    "max_crops": 2,
    "kv_cache_memory_gb": 0.25,
}


@pytest.fixture(scope="session")
def stub_vlm(cache_dir: Path) -> Iterator[EdgeVLM]:
    """A tiny model with vLLM in the engine's thread; tests must leave it usable.

    vLLM supports one engine per process, so every other one needs `engine="process"`.
    """
    with EdgeVLM(**STUB, cache_dir=cache_dir) as vlm:
        yield vlm


@pytest.fixture(scope="session")
def process_vlm(cache_dir: Path) -> Iterator[EdgeVLM]:
    """The same with vLLM's core in a child process; tests must leave it usable."""
    with EdgeVLM(**STUB, cache_dir=cache_dir, engine="process") as vlm:
        yield vlm


@pytest.fixture(params=["stub_vlm", "process_vlm"], ids=["thread", "process"])
def real_vlm(request: pytest.FixtureRequest) -> EdgeVLM:
    """Each of the two."""
    vlm: EdgeVLM = request.getfixturevalue(request.param)
    return vlm


@pytest.fixture
def photo() -> np.ndarray:
    """A small seeded image, H×W×3 uint8."""
    return np.random.default_rng(7).integers(0, 256, (90, 120, 3), dtype=np.uint8)
