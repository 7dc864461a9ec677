"""What the options of ``python -m molmo_edge.bench`` mean: engine settings, plan and files.

This module knows nothing about typer or rich, so that it can be tested and reused without them.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from molmo_edge.bench import cases as case_set
from molmo_edge.bench.cases import Case
from molmo_edge.bench.document import Document
from molmo_edge.bench.measure import Plan
from molmo_edge.bench.store import write, write_text
from molmo_edge.bench.suite import CACHES_OFF, CACHES_ON
from molmo_edge.bench.tables import markdown
from molmo_edge.errors import BenchmarkError

N = TypeVar("N", int, float)

STUB = "stub"
MADE_UP_TOKENS, REAL_TOKENS = 128, 300
MADE_UP_LIMIT_S, REAL_LIMIT_S = 210.0, 900.0


@dataclass(frozen=True)
class Target:
    """Which engine to build: the arguments of ``EdgeVLM``, those left alone being absent."""

    model: str | None = None
    config: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def chosen(cls, model: str | None, config: Path | None, options: dict[str, Any]) -> Target:
        """The user's choice; the stub where neither option, file nor environment name a model."""
        if model is None and config is None and not os.environ.get("MOLMO_EDGE_MODEL"):
            model = STUB
        return cls(model, config, {k: v for k, v in options.items() if v is not None})

    @property
    def made_up(self) -> bool:
        """True if the weights are random for certain."""
        return self.model == STUB or self.options.get("load_format") == "dummy"

    def arguments(self, caches: bool | None) -> dict[str, Any]:
        """Keyword arguments of ``EdgeVLM`` for an engine with its caches on, off or as set."""
        arguments = dict(self.options)
        if self.config is not None:
            arguments["config"] = str(self.config)
        if caches is not None:
            arguments |= CACHES_ON if caches else CACHES_OFF
        return arguments

    def open(self, caches: bool) -> AbstractContextManager[Any]:
        """Build the engine."""
        from molmo_edge import EdgeVLM

        vlm: AbstractContextManager[Any] = EdgeVLM(self.model, **self.arguments(caches))
        return vlm

    def start_command(self, image: Path | None) -> tuple[str, ...]:
        """The fresh process of the cold-start scenario."""
        told = {
            "model": self.model,
            "options": self.arguments(None),
            "image": None if image is None else str(image.resolve()),
        }
        return (sys.executable, "-m", "molmo_edge.bench.coldstart", json.dumps(told))


def plan_of(target: Target, **given: Any) -> Plan:
    """The plan with what the user gave; the rest by whether the weights are made up.

    Random weights never end an answer by themselves, so their answers have a fixed length; and
    they are tried by people who wait, so unless told otherwise their time limit is firm.

    Raises:
        BenchmarkError: a number is out of range.
    """
    made_up = target.made_up
    known = {name: value for name, value in given.items() if value is not None}
    least = known.get("iterations", Plan.iterations)
    chosen: dict[str, Any] = {
        "max_tokens": MADE_UP_TOKENS if made_up else REAL_TOKENS,
        "time_limit_s": MADE_UP_LIMIT_S if made_up else REAL_LIMIT_S,
        "ignore_eos": made_up,
        "max_iterations": 2 * least,
        "firm": made_up and not known.keys() & {"iterations", "time_limit_s"},
    }
    chosen.update(known)
    return Plan(**chosen)


def cases_of(
    images: list[Path], question: str | None, sizes: str | None, crops: str | None
) -> tuple[Case, ...]:
    """The standard cases or the user's pictures, at every size and number of crops asked for.

    Raises:
        BenchmarkError: a picture, size or number cannot be used.
    """
    chosen = case_set.own(images, question) if images else case_set.standard()
    return case_set.swept(chosen, sizes_of(sizes), numbers_of(crops, "--sweep-crops", int))


def sizes_of(text: str | None) -> tuple[tuple[int, int], ...]:
    """``640x480,1280x960`` as (width, height) pairs in pixels."""
    sizes = []
    for part in filter(None, (text or "").split(",")):
        found = re.fullmatch(r"\s*([1-9]\d{0,4})\s*x\s*([1-9]\d{0,4})\s*", part)
        if found is None:
            raise BenchmarkError("--sizes must look like 640x480,1280x960 (width x height)")
        sizes.append((int(found[1]), int(found[2])))
    return tuple(sizes)


def numbers_of(text: str | None, option: str, kind: Callable[[str], N]) -> tuple[N, ...]:
    """``1,2,4`` as numbers."""
    try:
        return tuple(kind(part) for part in (text or "").split(",") if part.strip())
    except ValueError as exc:
        raise BenchmarkError(f"{option} must be numbers separated by commas, like 1,2,4") from exc


@dataclass(frozen=True)
class Files:
    """Where a result goes: JSON always, Markdown beside it."""

    json: Path

    @classmethod
    def at(cls, output: Path, label: str, now: datetime | None = None) -> Files:
        """``output`` is a ``.json`` file, or a folder that gets a file named by time and label.

        Raises:
            BenchmarkError: the place cannot be written.
        """
        stamp = (now or datetime.now(UTC)).strftime("%Y-%m-%d-%H%M%S")
        name = re.sub(r"[^A-Za-z0-9.]+", "-", label).strip("-.")[:60] or "result"
        path = output if output.suffix == ".json" else output / f"{stamp}-{name}.json"
        # A run of many minutes must not find out at its end that it cannot be written.
        probe = path.with_name(f".{path.name}.probe")
        write_text("", probe)
        probe.unlink(missing_ok=True)
        return cls(path)

    @property
    def markdown(self) -> Path:
        """The Markdown page beside the JSON document."""
        return self.json.with_suffix(".md")

    def save(self, document: Document) -> None:
        """Write both, each atomically."""
        write(document, self.json)
        write_text(markdown(document), self.markdown)
