"""``python -m molmo_edge``, and the `molmo-edge` command."""

from __future__ import annotations

from molmo_edge.cli.app import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
