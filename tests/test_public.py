"""Public names, imports and errors."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import pytest

import molmo_edge
from molmo_edge import errors

# Packages that take seconds or that only an extra installs.
HEAVY = (
    *("torch", "vllm", "transformers"),
    *("kanoa", "openai", "pandas", "matplotlib", "rclpy", "pyarrow", "ray"),
)


def test_neither_import_nor_fake_engine_loads_vllm_or_what_an_extra_installs() -> None:
    code = (
        "import sys, molmo_edge, molmo_edge.points, molmo_edge.images, molmo_edge.results, "
        "molmo_edge.settings, molmo_edge.checkpoint_files\n"
        "from molmo_edge.engine.fake import FakeEngine\n"
        "with molmo_edge.EdgeVLM(engine=FakeEngine.factory()) as vlm:\n"
        "    assert vlm.query(None, 'hello').text\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert out.stdout.strip() == "[]"


def test_every_public_name_exists_and_is_sorted() -> None:
    assert molmo_edge.__all__ == sorted(molmo_edge.__all__)
    for name in molmo_edge.__all__:
        assert getattr(molmo_edge, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        molmo_edge.Nothing  # noqa: B018


def test_every_error_is_in_the_tree_of_the_modules_docstring() -> None:
    for name, cls in inspect.getmembers(errors, inspect.isclass):
        if cls.__module__ == errors.__name__:
            assert issubclass(cls, errors.MolmoEdgeError)
            assert name in (errors.__doc__ or "")


def test_without_vllm_the_error_names_both_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(errors.MissingDependencyError) as caught:
        molmo_edge.EdgeVLM("stub")
    assert "molmo-edge[cuda]" in str(caught.value)
    assert "molmo-edge[cpu]" in str(caught.value)
