"""Write docs/settings.md and docs/api.md from the docstrings: ``python scripts/reference.py``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import molmo_edge
from molmo_edge import errors, label
from molmo_edge.requests import ChoiceOptions, Options, VideoOptions
from molmo_edge.sampling import Sampling
from molmo_edge.settings import EdgeSettings
from molmo_edge.vlm import WatchOptions

DOCS = Path(__file__).parents[1] / "docs"
MADE = "<!-- Written by scripts/reference.py from the docstrings. -->"


def settings_page() -> str:
    """A row for each field of `EdgeSettings`."""
    document = inspect.getdoc(EdgeSettings) or ""
    about = re.sub(r"\n {8}", " ", document.partition("Attributes:\n")[2])
    texts = dict(re.findall(r"^ {4}(\w+): (.*)$", about, re.MULTILINE))
    rows = []
    for name, field in EdgeSettings.model_fields.items():
        default = field.get_default(call_default_factory=True)
        shown = "not set" if default is None else f"`{default}`"
        rows.append(f"| `{name}` | {shown} | {texts[name]} |")
    head = (
        "A setting is an argument of `EdgeVLM(...)`, a variable (`MOLMO_EDGE_` and its name in\n"
        "capitals), a line of `.env` (the same name), or a key of a TOML file (`--config` or\n"
        "`MOLMO_EDGE_CONFIG`). The first of these that has it decides, then the device's profile,\n"
        "then the default. `none` and an empty string count as not given in variables.\n"
        "`molmo-edge config show` prints each value and its source."
    )
    return "\n".join(
        ["# Settings", "", MADE, "", head, "", "| name | default | |", "|---|---|---|", *rows, ""]
    )


def api_page() -> str:
    """Signature and docstring of each public name and its public methods."""
    parts = ["# API", MADE, "The errors:", "    " + _tree().replace("\n", "\n    ")]
    parts += ["## Options of a request", _text(Options), _text(Sampling)]
    for one in (VideoOptions, ChoiceOptions, WatchOptions):
        parts += [f"## {one.__name__}", _text(one)]
    for module in (molmo_edge, label):
        for name in module.__all__:
            thing = getattr(module, name)
            if callable(thing):
                full = name if module is molmo_edge else f"label.{name}"
                parts += [f"## {full}", *_described(full, thing)]
                parts += [part for one in _methods(thing) for part in one]
    return "\n\n".join(part for part in parts if part) + "\n"


def _tree() -> str:
    return inspect.cleandoc((errors.__doc__ or "").partition("::\n")[2].partition("\n\nMess")[0])


def _methods(kind: Any) -> Iterator[list[str]]:
    for name, member in vars(kind).items() if inspect.isclass(kind) else ():
        thing = member.__func__ if isinstance(member, staticmethod | classmethod) else member
        if name[0] == "_" or not (inspect.isfunction(thing) or isinstance(thing, property)):
            continue
        full = f"{kind.__name__}.{name}"
        if isinstance(thing, property):
            yield [f"### `{full}`", _text(thing)]
        else:
            yield [f"### {name}", *_described(full, thing)]


def _described(name: str, thing: Any) -> list[str]:
    try:
        signature = re.sub(r"\((self|cls)\b[^,)]*(, )?", "(", str(inspect.signature(thing)))
    except ValueError:
        signature = ""
    return [f"    {name}{signature.replace(chr(39), '')}", _text(thing)]


def _text(thing: Any) -> str:
    """The docstring, its sections as Markdown lists."""
    text = re.sub(r"^(\w+):$", r"\1:\n", inspect.cleandoc(thing.__doc__ or ""), flags=re.MULTILINE)
    text = re.sub(r"^ {4}(?=\S)", "- ", text, flags=re.MULTILINE)
    return re.sub(r"^ {8}(?=\S)", "  ", text, flags=re.MULTILINE)


PAGES = {"settings.md": settings_page, "api.md": api_page}

if __name__ == "__main__":
    for file, page in PAGES.items():
        (DOCS / file).write_text(page(), encoding="utf-8")
