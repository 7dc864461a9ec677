"""Dockerfiles and locks: pinned, complete, and replayable without a container engine."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("thor", "x86")
LOCKS = [f"{name}{more}.lock" for name in NAMES for more in ("", "-tensorflow")]


def pins(lock: str) -> dict[str, str]:
    text = (ROOT / "requirements" / lock).read_text()
    return dict(re.findall(r"^([a-z0-9.-]+)==(\S+) \\$", text, re.MULTILINE))


@pytest.fixture(scope="module")
def replay() -> ModuleType:
    path = ROOT / "scripts/replay_dockerfile.py"
    spec = util.spec_from_file_location("replay_dockerfile", path)
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


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
def test_locks_meet_what_the_package_asks_for(name: str) -> None:
    locked = pins(f"{name}.lock")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["cuda"]]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(locked[requirement.name]), requirement
    assert locked["vllm"].startswith("0.32.")
    # The image builds the package with the lock's own setuptools.
    assert Version(locked["setuptools"]) >= Version("77")
    assert "nvidia-cublas" in locked  # CUDA's torch, on aarch64 too


@pytest.mark.parametrize("name", NAMES)
def test_tensorflow_is_apart_and_agrees_with_the_rest(name: str) -> None:
    locked, more = pins(f"{name}.lock"), pins(f"{name}-tensorflow.lock")
    assert "tensorflow" not in locked and "tensorflow" in more
    assert {n: v for n, v in more.items() if n in locked} == {
        n: v for n, v in locked.items() if n in more
    }


@pytest.mark.parametrize("name", NAMES)
def test_images_are_pinned_staged_and_not_roots(name: str, replay: ModuleType) -> None:
    text = (ROOT / f"Dockerfile.{name}").read_text()
    steps: list[tuple[str, str]] = replay.instructions(text)
    bases = [rest.split(" AS ")[0] for word, rest in steps if word == "FROM"]
    assert len(bases) == 2
    assert all(re.fullmatch(r"python:3\.12\.\d+-slim-[a-z]+", base) for base in bases)
    last = [step for i, step in enumerate(steps) if "FROM" not in dict(steps[i:])]
    named = dict(last)
    assert named["USER"] == "10001:10001"
    assert json.loads(named["VOLUME"]) == ["/cache"]
    assert json.loads(named["ENTRYPOINT"]) == ["molmo-edge"]
    assert '"doctor"' in named["HEALTHCHECK"]
    assert "MOLMO_EDGE_CACHE_DIR=/cache" in named["ENV"].split()
    for word, rest in steps:
        if word == "RUN" and "pip install" in rest:
            assert "--require-hashes" in rest or "--no-index" in rest
        if word == "RUN" and "tensorflow" in rest:
            assert rest.startswith('if [ "$TENSORFLOW" = 1 ]')
    assert ("ARG", "TENSORFLOW=0") in steps


def test_the_two_images_differ_in_names_alone() -> None:
    def plain(name: str) -> list[str]:
        text = (ROOT / f"Dockerfile.{name}").read_text()
        text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)
        for word in ("aarch64", "x86_64", "rtx5080", "thor", "x86"):
            text = re.sub(rf"\b{word}\b", "X", text)
        return text.splitlines()

    assert plain("thor") == plain("x86")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", NAMES)
def test_the_steps_replay_in_plain_folders(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "scripts/replay_dockerfile.py", f"Dockerfile.{name}", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["user"] == "10001:10001"
    assert report["entry_status"] == 0
    assert report["health_status"] in (0, 1)  # 1: a sick machine, told as JSON
    assert any("molmo_edge molmo_edge" in step for step in report["ran"])
    assert len(report["stood_in"]) == 1 and f"{name}.lock" in report["stood_in"][0]
    # Whatever is not run is known: the machine's architecture, TensorFlow, and Debian's tools.
    assert len(report["left_out"]) == 4
    assert "etc/molmo-edge/config.toml" in {
        str(path.relative_to(tmp_path / "final")) for path in tmp_path.glob("final/etc/*/*")
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("COPY molmo_edge", "COPY molmo_edges"), "not in the build context"),
        (("COPY molmo_edge", "COPY tests"), "not in the build context"),
        (("-r requirements/x86.lock", "-r requirements/x87.lock"), "no requirements/x87.lock"),
        (("ENTRYPOINT", "ONBUILD"), "does not know ONBUILD"),
    ],
)
def test_a_build_that_would_fail_fails_in_the_replay(
    change: tuple[str, str], said: str, tmp_path: Path, replay: ModuleType
) -> None:
    # Without the slow steps for Python: what is changed comes before or after them.
    text = (ROOT / "Dockerfile.x86").read_text().replace(*change)
    text = re.sub(r"RUN \S+/pip install --no-cache-dir --no-deps.*\n", "", text)
    text = text.replace("RUN python -m venv /opt/molmo-edge", (
        "RUN mkdir -p /opt/molmo-edge/lib/python3/site-packages"
    ))  # fmt: skip
    (tmp_path / "Dockerfile").write_text(text)
    with pytest.raises(replay.ReplayError, match=said):
        replay.replay(tmp_path / "Dockerfile", tmp_path / "stages")


@pytest.mark.parametrize(
    ("path", "out"),
    [
        ("pyproject.toml", False),
        ("requirements/x86.lock", False),
        ("molmo_edge/vlm.py", False),
        ("configs/thor.toml", False),
        ("molmo_edge/__pycache__/vlm.pyc", True),
        (".git", True),
        ("tests", True),
        (".env", True),
    ],
)
def test_the_context_holds_what_images_are_made_of(
    path: str, out: bool, replay: ModuleType
) -> None:
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [rule for rule in rules if rule and not rule.startswith("#")]
    assert replay.ignored(path, rules) is out
