"""Every command and code block of the README, the docs, the benchmark notes and the Dockerfiles.

Python blocks run on a fake engine. Commands of molmo_edge run likewise, or are parsed by the
command line itself where they need weights, a camera or minutes; others are checked against the
files, extras, make targets and options that they name.
"""

from __future__ import annotations

import importlib.util
import re
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
from pydantic import BaseModel

import molmo_edge
from molmo_edge import EdgeVLM
from molmo_edge.cli import app as root
from molmo_edge.engine.fake import FakeEngine
from molmo_edge.settings import resolve

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks" / "README.md",
    ROOT / "Dockerfile.thor",
    ROOT / "Dockerfile.x86",
]
RUN = ("ask", "caption", "point", "count", "warmup", "doctor", "plan", "profiles", "config")
OTHER_PROGRAMS = ("git", "cd", "unzip", "grep", "export", "source", "curl")
STARTS = ("molmo-edge", "python", "pip", "make", "docker")
POINT = '<point x="50" y="50" alt="mug">mug</point>'
PHOTO = np.zeros((48, 64, 3), np.uint8)


class Receipt(BaseModel):
    total: float = 0.0


class FakeVLM(EdgeVLM):
    """`EdgeVLM` on a fake engine, with a camera of two frames."""

    def __init__(self, model: Any = None, **settings: Any) -> None:
        def answer(turns: Any) -> str:
            return POINT if re.search("point|how many", turns[-1].text, re.I) else '{"total": 1}'

        super().__init__(model, **{"engine": FakeEngine.factory(answer), **settings})

    def watch(self, source: Any, *args: Any, **options: Any) -> Any:
        frames = iter([PHOTO, PHOTO]) if isinstance(source, int) else source
        return super().watch(frames, *args, **options)


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in one of these languages."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [text for language, text in fences if language in languages]


def commands(page: Path) -> list[str]:
    """Lines of shell blocks and Dockerfile comments, and commands quoted in the text."""
    text = page.read_text()
    if page.suffix != ".md":
        header = "\n".join(line for line in text.splitlines() if line.startswith("#   "))
        lines = header.replace("#   ", "").replace("\\\n", "").splitlines()
    else:
        indented = re.findall(r"(?<=\n\n)(?: {4}\S.*\n(?: {4}.*\n)*)", re.sub(
            r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL
        ))  # fmt: skip
        shell = "\n".join([*blocks(page, "bash", "sh", "console"), *indented])
        lines = shell.replace("\\\n", "").splitlines()
        lines += [code for code in re.findall(r"`([^`\n]+)`", text) if code.split()[0] in STARTS]
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the repository's files and a photo by every name of the pages."""
    for name in ("configs", "benchmarks", "examples", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    for page in PAGES:
        for name in re.findall(r"\b[\w-]+\.(?:jpg|png)\b", page.read_text()):
            Image.fromarray(PHOTO).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(molmo_edge, "EdgeVLM", FakeVLM, raising=False)
    return tmp_path


@pytest.mark.parametrize("code", [code for page in PAGES for code in blocks(page, "python")])
def test_a_python_block_runs(code: str, directory: Path) -> None:
    needed = re.findall(r"^\s*(?:from|import) ([\w.]+)", code, re.MULTILINE)
    absent = [name for name in needed if importlib.util.find_spec(name.split(".")[0]) is None]
    parents = [name.split(".")[0] for name in absent]
    stand_ins = {name: mock.MagicMock() for name in (*parents, *absent)}  # ROS and the like
    with FakeVLM() as vlm, mock.patch.dict(sys.modules, stand_ins):
        exec(compile(code, "block", "exec"), {"vlm": vlm, "Receipt": Receipt, "image": PHOTO})


def test_a_toml_block_is_a_config_file(directory: Path) -> None:
    for code in (code for page in PAGES for code in blocks(page, "toml")):
        Path("block.toml").write_text(code)
        resolve({}, config="block.toml")


@pytest.mark.parametrize("line", {line: None for page in PAGES for line in commands(page)})
def test_a_command_is_right(line: str, directory: Path) -> None:
    for part in re.split(r"\s(?:\||&&)\s", re.sub(r"\s#.*", "", line)):
        words = [word for word in shlex.split(part) if word != "..."]
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words.pop(0)
        if words:
            check(words[0], words[1:])


def check(program: str, words: list[str]) -> None:
    if program == "molmo-edge":
        check_ours(words)
    elif program == "docker":
        names = [word for word in words if word.startswith("molmo-edge:")]
        if words[0] == "build" and len(words) > 1:
            assert (ROOT / words[words.index("-f") + 1]).is_file()
        elif names and (words := words[words.index(names[0]) + 1 :]):
            check_ours(words)
    elif program == "make":
        targets = [word for word in words if "=" not in word]
        subprocess.run(["make", "-n", *targets], cwd=ROOT, check=True, capture_output=True)
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for word in words:
            if match := re.fullmatch(r"molmo-edge\[(.*)\]", word):
                assert set(match[1].split(",")) <= set(extras["optional-dependencies"])
    elif program.startswith("python"):
        check_python(words)
    else:
        assert program in OTHER_PROGRAMS, f"unknown program {program}"


def check_python(words: list[str]) -> None:
    if words[:2] == ["-m", "molmo_edge.bench"]:
        check_ours(["bench", *words[2:]])
    elif words[:2] == ["-m", "molmo_edge"]:
        check_ours(words[2:])
    elif words[0] == "-m":
        assert importlib.util.find_spec(words[1]) is not None
    else:
        script = ROOT / words[0]
        sources = "".join(path.read_text() for path in script.parent.glob("*.py"))
        assert script.is_file()
        for option in (word.partition("=")[0] for word in words[1:] if word.startswith("--")):
            name = option.removeprefix("--")
            assert f'"{option}"' in sources or f"{name.replace('-', '_')}:" in sources


def check_ours(words: list[str]) -> None:
    if not words or words[0] not in RUN:
        parse(typer.main.get_command(root.app), words)
    else:
        with pytest.raises(SystemExit) as ended:
            root.main(words)
        assert ended.value.code in (None, 0, 1)


def parse(command: Any, words: list[str]) -> None:
    """Parse the arguments as the command line would, without running anything."""
    if words and words[0] in getattr(command, "commands", ()):
        parse(command.commands[words[0]], words[1:])
    elif words:
        assert words[0].startswith("-") or not hasattr(command, "commands"), f"no {words[0]}"
        command.make_context(command.name, list(words)).close()
