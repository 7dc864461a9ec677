"""The embedded default model: real Molmo architecture, made-up weights, no download.

Its tiny language model is built, not drawn: embedding and head hold a next-token table that spells
`TEXT`, so that a newcomer reads what this is instead of gibberish.
"""

from __future__ import annotations

from pathlib import Path

from molmo_edge.models.molmo.written import ensure_written

NAME = "stub"
# The sentence in tokens; none may stand in it twice, nor the colon of "Assistant:" that starts it.
TOKENS = (
    "ĠThis Ġis Ġthe Ġmolmo _ edge Ġstub Ġ ( real Ġarchitecture , Ġmade - up Ġweights ) ."
).split()
TEXT = "This is the molmo_edge stub (real architecture, made-up weights)."
NOTICE = (
    "This is the built-in stub: real Molmo architecture, made-up weights. Its answers mean "
    "nothing; give a checkpoint for real ones."
)
_VERSION = 1


def ensure_stub(cache_dir: Path) -> Path:
    """Folder of the stub checkpoint (0.6 GB), written on first use.

    Raises ModelError when the cache folder cannot be written.
    """
    return ensure_written(cache_dir / f"stub-{_VERSION}", _write, "The stub checkpoint (0.6 GB)")


def _write(folder: Path) -> None:
    # Only now: torch takes seconds to import.
    from molmo_edge.models.molmo.stub_weights import write

    write(folder)
