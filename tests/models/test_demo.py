"""The demo in the package: found without being copied, and refused where it is damaged."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import molmo_edge
from molmo_edge.engine.doctor import diagnose
from molmo_edge.errors import ModelError
from molmo_edge.models import hub

ROOT = Path(molmo_edge.__file__).parent


def flip(path: Path) -> None:
    """Change one bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage",
    [
        lambda directory: directory.rename(directory.with_name("gone")),
        lambda directory: cut(directory / "model.safetensors"),
        lambda directory: cut(directory / "tokenizer.json"),
        lambda directory: (directory / "config.json").write_text('{"model_type": "molmo3"}'),
        lambda directory: (directory / "generation_config.json").write_text("{}"),
        lambda directory: flip(directory / "model.safetensors"),
        lambda directory: (directory / hub.DIGESTS).unlink(),
        lambda directory: (directory / hub.DIGESTS).write_bytes(b"\xff"),
        lambda directory: (directory / hub.DIGESTS).write_bytes(b""),
        lambda directory: (directory / "model.safetensors").unlink(),
        lambda directory: (directory / "tokenizer.json").unlink(),
        lambda directory: (directory / "preprocessor_config.json").unlink(),
    ],
)
def test_a_damaged_demo_is_a_model_error_that_says_what_to_do(
    damage: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = Path(shutil.copytree(hub.DEMO_DIRECTORY, tmp_path / "demo"))
    monkeypatch.setattr(hub, "DEMO_DIRECTORY", directory)
    assert hub.locate("demo", tmp_path / "cache") == directory
    damage(directory)
    for locate in (hub.locate, hub.locate_cached):
        with pytest.raises(ModelError, match="Install molmo-edge again"):
            locate("demo", tmp_path / "cache")
    [model] = [one for one in diagnose(model="demo").findings if one.what == "Model"]
    assert model.level == "problem" and "Install molmo-edge again" in model.detail
    assert not (tmp_path / "cache").exists()


def test_the_package_has_the_whole_demo_and_stays_small() -> None:
    patterns = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["tool"]["setuptools"]
    packaged = {path for one in patterns["package-data"]["molmo_edge"] for path in ROOT.glob(one)}
    demo = {path for path in hub.DEMO_DIRECTORY.rglob("*") if path.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {
        path.name for path in demo
    }
    assert demo <= packaged
    size = sum(path.stat().st_size for path in demo)
    assert size < 8e6
    # Everything of the wheel, uncompressed.
    assert sum(path.stat().st_size for path in {*packaged, *ROOT.rglob("*.py")}) < 15e6
