"""Every command and code block of the README, the docs, the benchmark notes and the Dockerfiles.

Python blocks run on a fake engine, and those of docs/integrations.md also on the demo. Commands of
molmo_edge are parsed by the command line itself, others are checked against the files, extras, make
targets and options that they name.
"""

from __future__ import annotations

import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import typer.main
from PIL import Image

import molmo_edge
from molmo_edge import EdgeVLM
from molmo_edge.cli import app
from molmo_edge.engine.fake import FakeEngine
from molmo_edge.video import write_video

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks" / "README.md",
    ROOT / "ros2" / "README.md",
    ROOT / "Dockerfile.thor",
    ROOT / "Dockerfile.x86",
]
OURS = ("molmo-edge", "python", "pip", "make", "docker")
OTHERS = (
    *("colcon", "ros2", "git", "cd", "unzip", "grep", "export", "source", "curl"),
    "lerobot-annotate",
)
PHOTO = np.zeros((48, 64, 3), np.uint8)


def answer(turns: Any) -> str:
    pointing = re.search("point|how many", turns[-1].text, re.I)
    return '<point x="50" y="50" alt="mug">mug</point>' if pointing else '{"total": 1}'


class FakeVLM(EdgeVLM):
    """`EdgeVLM` on a fake engine, with a camera of two frames."""

    def __init__(self, model: Any = None, **settings: Any) -> None:
        super().__init__(model, **{"engine": FakeEngine.factory(answer), **settings})

    def watch(self, source: Any, *args: Any, **options: Any) -> Any:
        camera = isinstance(source, int | str)
        frames = (lambda: iter([PHOTO, PHOTO])) if camera else source
        return super().watch(frames, *args, **options)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """Lines of shell blocks and Dockerfile headers, and commands quoted in the text."""
    text = page.read_text()
    headers = re.findall(r"^#   (.*\n)", text, re.MULTILINE) if page.suffix != ".md" else []
    lines = "".join([*headers, *blocks(page, "bash")]).replace("\\\n", "").splitlines()
    quoted = re.findall(r"`([^`\n]+)`", text) if page.suffix == ".md" else []
    return [*filter(None, lines), *(code for code in quoted if code.split()[0] in OURS)]


def test_every_block_is_python_bash_or_output() -> None:
    for page in PAGES:
        opened = re.findall(r"^```(\w*)$", page.read_text(), re.MULTILINE)[::2]
        assert set(opened) <= {"python", "bash", "text"}, page


@pytest.mark.parametrize("code", [code for page in PAGES for code in blocks(page, "python")])
def test_a_python_block_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in re.findall(r"\b[\w/-]+\.(?:jpg|png)\b", code):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PHOTO).save(tmp_path / name)
    for name in re.findall(r"\b[\w-]+\.mp4\b", code):
        write_video(tmp_path / name, [PHOTO] * 4, fps=2)
    monkeypatch.setattr(molmo_edge, "EdgeVLM", FakeVLM, raising=False)
    needed = re.findall(r"^(?:from|import) ([\w.]+)", code, re.MULTILINE)
    absent = [name for name in needed if importlib.util.find_spec(name.split(".")[0]) is None]
    absent += ["ray"]  # which would start a cluster
    stand_ins = {name: mock.MagicMock() for name in absent}  # ROS and the like
    with mock.patch.dict(sys.modules, stand_ins):
        exec(compile(code, "block", "exec"), {})


@pytest.mark.parametrize("line", {line: None for page in PAGES for line in commands(page)})
def test_a_command_is_right(line: str) -> None:
    for part in re.split(r"\s(?:\||&&)\s", re.sub(r"\s#.*", "", line)):
        words = [word for word in shlex.split(part) if word != "..."]
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words.pop(0)
        if words:
            check(words[0], words[1:])


def check(program: str, words: list[str]) -> None:
    if program == "molmo-edge":
        parse(typer.main.get_command(app.app), words)
    elif program == "docker" and words[0] == "build":
        assert len(words) == 1 or (ROOT / words[words.index("-f") + 1]).is_file()
    elif program == "docker":
        [image] = [i for i, word in enumerate(words) if word.startswith("molmo-edge:")]
        check("molmo-edge", words[image + 1 :])
    elif program == "make":
        subprocess.run(["make", "-n", *words], cwd=ROOT, check=True, capture_output=True)
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for names in re.findall(r"molmo-edge\[(.*?)\]", " ".join(words)):
            assert set(names.split(",")) <= set(extras["optional-dependencies"])
    elif program == "python" and words[:2] == ["-m", "vllm.entrypoints.openai.api_server"]:
        pass  # tests/engine/test_served.py runs it
    elif program == "python3" and words[:2] == ["-m", "venv"]:
        pass
    elif program == "python" and words[0] == "-m":
        bench = ["bench"] if words[1] == "molmo_edge.bench" else []
        assert words[1].startswith("molmo_edge")
        check("molmo-edge", [*bench, *words[2:]])
    elif program == "python":
        source = (ROOT / words[0]).read_text()
        for option in (word for word in words if word.startswith("--")):
            assert f'"{option}"' in source
    else:
        assert program in OTHERS, f"unknown program {program}"


def test_the_generated_pages_are_current() -> None:
    reference = runpy.run_path(str(ROOT / "scripts" / "reference.py"))
    for name, page in reference["PAGES"].items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == page(), (
            f"docs/{name}: run python scripts/reference.py"
        )
    assert "| `dtype` | `auto` |" in (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")


@pytest.mark.engine
@pytest.mark.slow
def test_the_integrations_page_shows_what_its_code_does_with_the_demo() -> None:
    page = ROOT / "docs" / "integrations.md"
    assert len(blocks(page, "python")) == len(blocks(page, "text"))
    script = [sys.executable, ROOT / "scripts" / "integrations.py", "--check"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"run python scripts/integrations.py\n{done.stdout}{done.stderr}"


def parse(command: Any, words: list[str]) -> None:
    """Parse the arguments as the command line would, without running anything."""
    if words and words[0] in getattr(command, "commands", ()):
        parse(command.commands[words[0]], words[1:])
    elif words:
        assert words[0].startswith("-") or not hasattr(command, "commands"), f"no {words[0]}"
        command.make_context(command.name, list(words)).close()
