"""molmo_edge: Molmo vision-language models inside your own process, on vLLM, for edge GPUs.

    from molmo_edge import EdgeVLM

    with EdgeVLM("allenai/Molmo-7B-D-0924") as vlm:
        print(vlm.query("photo.jpg", "What is on the table?").text)

Names are loaded when first used: importing this package loads neither torch nor vLLM.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from molmo_edge._version import __version__ as __version__

_WHERE = {
    "EdgeVLM": "molmo_edge.vlm",
    "Request": "molmo_edge.requests",
    "Stream": "molmo_edge.stream",
    "Result": "molmo_edge.results",
    "Choice": "molmo_edge.results",
    "Metrics": "molmo_edge.results",
    "Score": "molmo_edge.results",
    "Point": "molmo_edge.points",
    "PointResult": "molmo_edge.points",
    "parse_points": "molmo_edge.points",
    "CountResult": "molmo_edge.points",
    "TrackResult": "molmo_edge.points",
    "Seen": "molmo_edge.watch",
    "State": "molmo_edge.engine.loop",
    "Video": "molmo_edge.video",
    "MolmoEdgeError": "molmo_edge.errors",
}

__all__ = sorted([*_WHERE, "__version__"])

if TYPE_CHECKING:
    from molmo_edge.engine.loop import State as State
    from molmo_edge.errors import MolmoEdgeError as MolmoEdgeError
    from molmo_edge.points import CountResult as CountResult
    from molmo_edge.points import Point as Point
    from molmo_edge.points import PointResult as PointResult
    from molmo_edge.points import TrackResult as TrackResult
    from molmo_edge.points import parse_points as parse_points
    from molmo_edge.requests import Request as Request
    from molmo_edge.results import Choice as Choice
    from molmo_edge.results import Metrics as Metrics
    from molmo_edge.results import Result as Result
    from molmo_edge.results import Score as Score
    from molmo_edge.stream import Stream as Stream
    from molmo_edge.video import Video as Video
    from molmo_edge.vlm import EdgeVLM as EdgeVLM
    from molmo_edge.watch import Seen as Seen


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
