"""Replays a Dockerfile of this repository in plain folders: no container engine, no root, no GPU.

    python scripts/replay_dockerfile.py Dockerfile.thor FOLDER

What it proves: every file that is copied is there and reaches the build, every step for Python
runs, and the result's entry point and health check start from what was installed. Two kinds of
steps cannot be had here, and the report says so: those for Debian's tools are left out, and the
CUDA wheels of a lock are stood in for by the packages of the Python that runs this script.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath

REPOSITORY = Path(__file__).resolve().parent.parent
_DEBIAN = ("apt-get", "groupadd", "useradd")
_OURS = ("/opt", "/build", "/etc/molmo-edge", "/cache", "/work")
_STAND_IN = "stand_in.pth"


class ReplayError(Exception):
    """A step that a build would fail at too, or one that this script cannot read."""


@dataclass
class Stage:
    """One stage: its files lie below `root`."""

    name: str
    root: Path
    base: str
    workdir: str = "/"
    env: dict[str, str] = field(default_factory=dict)
    user: str = "root"
    volumes: list[str] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)

    def path(self, inside: str) -> Path:
        return self.root / str(PurePosixPath(self.workdir, inside)).lstrip("/")


@dataclass
class Report:
    """What was done with each step.

    Attributes:
        ran: run or copied as written.
        stood_in: run with something else in its place, and with what.
        left_out: not run, and why.
        entry_status, health_status: exit status of ``--version`` through the entry point, and of
            the health check; 1 is a sick machine, which one without a GPU is.
    """

    dockerfile: str
    ran: list[str] = field(default_factory=list)
    stood_in: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    entry_status: int | None = None
    health_status: int | None = None
    user: str = "root"


def instructions(text: str) -> list[tuple[str, str]]:
    """The Dockerfile's instructions, continuation lines joined and comments gone."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines()]


def ignored(path: str, rules: list[str]) -> bool:
    """Whether ``.dockerignore`` keeps a path out of the build; the last rule that fits decides."""
    out = False
    for rule in rules:
        wanted, pattern = rule.startswith("!"), rule.lstrip("!")
        parents = [path, *map(str, PurePosixPath(path).parents)]
        if any(fnmatch.fnmatchcase(one, pattern) for one in parents if one != "."):
            out = not wanted
        elif pattern.startswith("**/") and pattern[3:] in PurePosixPath(path).parts:
            out = not wanted
    return out


def replay(dockerfile: Path, folder: Path) -> Report:
    """Runs every step below `folder`. Raises ReplayError where a build would fail."""
    report = Report(dockerfile.name)
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    for word, rest in instructions(dockerfile.read_text(encoding="utf-8")):
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            name = name or "final"
            stage = stages[name] = Stage(name, folder / name, base)
            stage.root.mkdir(parents=True)
            report.ran.append(f"FROM {rest} (an empty folder)")
        elif stage is None:
            raise ReplayError(f"{word} before FROM")
        else:
            _step(stage, stages, word, rest, report)
    if stage is None or not stage.entrypoint:
        raise ReplayError("the last stage has no entry point")
    report.user = stage.user
    _start(stage, report)
    return report


def _step(stage: Stage, stages: dict[str, Stage], word: str, rest: str, report: Report) -> None:
    if word == "WORKDIR":
        stage.workdir = str(PurePosixPath(stage.workdir, rest))
        stage.path(".").mkdir(parents=True, exist_ok=True)
    elif word in ("ENV", "ARG"):
        for pair in shlex.split(rest):
            name, _, value = pair.partition("=")
            stage.env[name] = value
    elif word == "COPY":
        _copy(stage, stages, rest)
    elif word == "RUN":
        return _run(stage, rest, report)
    elif word == "USER":
        stage.user = rest
    elif word == "VOLUME":
        stage.volumes = json.loads(rest)
    elif word == "ENTRYPOINT":
        stage.entrypoint = json.loads(rest)
    elif word == "CMD":
        stage.command = json.loads(rest)
    elif word == "HEALTHCHECK":
        stage.health = json.loads(rest[rest.index("CMD") + 3 :])
    else:
        raise ReplayError(f"this script does not know {word}")
    report.ran.append(f"{word} {rest}")


def _copy(stage: Stage, stages: dict[str, Stage], rest: str) -> None:
    *sources, target = rest.split()
    context: Path | None = None
    if sources[0].startswith("--from="):
        context = stages[sources.pop(0).removeprefix("--from=")].root
    rules = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [rule for rule in rules if rule and not rule.startswith("#")]
    many = len(sources) > 1 or target.endswith("/")
    for source in sources:
        origin = (context or REPOSITORY) / source.lstrip("/")
        if not origin.exists() or (context is None and ignored(source, rules)):
            raise ReplayError(f"COPY {source}: not in the build context")
        goal = stage.path(target) / origin.name if many else stage.path(target)
        goal.parent.mkdir(parents=True, exist_ok=True)
        if origin.is_dir():
            caches = shutil.ignore_patterns("__pycache__", ".mypy_cache")
            shutil.copytree(origin, goal, symlinks=True, dirs_exist_ok=True, ignore=caches)
        else:
            shutil.copy2(origin, goal)


def _run(stage: Stage, step: str, report: Report) -> None:
    if any(tool in step for tool in _DEBIAN):
        report.left_out.append(f"RUN {step} (Debian's tools, as root)")
    elif step.startswith("test ") and "uname -m" in step:
        report.left_out.append(f"RUN {step} (this machine is {os.uname().machine})")
    elif step.startswith("if "):
        report.left_out.append(f"RUN {step} (its build argument is off)")
    elif "--require-hashes" in step:
        lock = shlex.split(step)[-1]
        if not stage.path(lock).is_file():
            raise ReplayError(f"RUN {step}: there is no {lock}")
        venv = stage.path(step.split("/bin/pip")[0])
        (packages,) = venv.glob("lib/python*/site-packages")
        for old in packages.glob("setuptools*"):  # Python 3.11's own would hide the lock's
            shutil.rmtree(old)
        # Paths alone: .pth files found there, an editable molmo_edge's among them, do not count.
        (packages / _STAND_IN).write_text("\n".join(site.getsitepackages()) + "\n")
        report.stood_in.append(f"RUN {step} (by the packages of this script's own Python)")
    else:
        _shell(stage, step)
        report.ran.append(f"RUN {step}")


def _shell(stage: Stage, step: str) -> None:
    words = step
    for prefix in _OURS:
        words = re.sub(rf"(?<![\w.]){prefix}(?=[/\s]|$)", f"{stage.root}{prefix}", words)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environ = {**os.environ, "PATH": path, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        ["bash", "-euc", words], cwd=stage.path("."), env=environ, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise ReplayError(f"RUN {step}: exit status {done.returncode}\n{done.stderr[-2000:]}")


def _start(stage: Stage, report: Report) -> None:
    """Starts entry point and health check with the stage's environment and files."""
    environ = {"HOME": str(stage.root)}
    for name, value in stage.env.items():
        parts = value.replace("$PATH", os.environ.get("PATH", "")).split(os.pathsep)
        moved = [f"{stage.root}{part}" if part.startswith(_OURS) else part for part in parts]
        environ[name] = os.pathsep.join(moved)
    scripts = stage.path("/opt/molmo-edge/bin")
    # Its first line names the folder of the stage that built it, as in the image it may.
    module = [str(scripts / "python"), "-m", "molmo_edge"]
    if not (scripts / stage.entrypoint[0]).is_file():
        raise ReplayError(f"the entry point {stage.entrypoint[0]} was not installed")

    def started(words: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            module + words, env=environ, cwd=stage.path("."), capture_output=True, text=True
        )

    code = "import molmo_edge; print(molmo_edge.__file__)"
    found = subprocess.run(
        [module[0], "-c", code], env=environ, cwd=stage.path("."), capture_output=True, text=True
    )
    if not found.stdout.startswith(str(stage.root)):
        where = found.stdout or found.stderr
        raise ReplayError(f"molmo_edge comes from outside the image: {where}")
    report.entry_status = started([*stage.entrypoint[1:], "--version"]).returncode
    healthy = started(stage.health[1:])
    report.health_status = healthy.returncode
    if "healthy" not in json.loads(healthy.stdout or "{}"):
        raise ReplayError(f"the health check answers nothing of use\n{healthy.stderr[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("dockerfile", type=Path)
    parser.add_argument("folder", type=Path, help="a new folder for the stages' files")
    options = parser.parse_args()
    try:
        report = replay(options.dockerfile, options.folder.resolve())
    except ReplayError as exc:
        sys.exit(f"{options.dockerfile.name}: {exc}")
    print(json.dumps(asdict(report), indent=2))


if __name__ == "__main__":
    main()
