"""``python -m molmo_edge.bench``, also ``molmo-edge bench``."""

from __future__ import annotations

from molmo_edge.cli.bench import app

if __name__ == "__main__":
    app(prog_name="python -m molmo_edge.bench")
