"""Imports go one way: no cycle, no import of a higher row; imports in functions count."""

from __future__ import annotations

import ast
from pathlib import Path

import molmo_edge

ROOT = Path(molmo_edge.__file__).parent
# From the ground up: a module may import from its own row and from the rows above it in this list.
ROWS = (
    ("errors", "_version"),
    ("results", "files"),
    ("images", "video", "settings", "sampling", "checkpoint_files"),
    ("interface", "points", "watch", "devices"),
    ("requests",),
    ("models",),
    ("engine",),
    ("stream", "vllm_plugin", "warmup"),
    ("vlm",),
    ("reference", "bench", "label"),
    ("quantize", "integrations"),
    ("cli",),
)
RANK = {name: rank for rank, row in enumerate(ROWS) for name in row}


def import_graph() -> dict[str, set[str]]:
    """Module to the modules it imports, named below ``molmo_edge``; ``__main__`` left out."""
    modules = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        used: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                names = [alias.name for alias in node.names if alias.name != "__version__"]
                full = [f"{node.module}.{name}" for name in names]
                used |= {one if one[11:] in modules else node.module for one in full}
            elif isinstance(node, ast.Import):
                used |= {alias.name for alias in node.names}
        # A public name of the package itself comes from vlm or from below it.
        used = {"molmo_edge.vlm" if one == "molmo_edge" else one for one in used}
        ours = {one.removeprefix("molmo_edge.") for one in used if one.startswith("molmo_edge.")}
        if name and not name.endswith("__main__"):
            graph[name] = ours & modules.keys() - {name}
    return graph


def test_no_import_goes_up() -> None:
    graph = import_graph()
    assert {name.split(".")[0] for name in graph} <= RANK.keys()
    assert [
        f"{name} -> {used}"
        for name, imported in graph.items()
        for used in imported
        if RANK[name.split(".")[0]] < RANK[used.split(".")[0]]
    ] == []


def test_no_import_cycle() -> None:
    graph = import_graph()
    while leaves := [name for name, imported in graph.items() if not imported & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert sorted(graph) == []
