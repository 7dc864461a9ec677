"""What `point` and `count` give back: what a text says, beside the `Result` it came from."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from molmo_edge.points import PointResult
from molmo_edge.results import Result

How = Literal["points", "stated", "none", "unread"]


@dataclass(frozen=True, repr=False)
class PointAnswer(PointResult):
    """A `PointResult` with its request.

    Attributes:
        label: what was asked for, as it stood in the prompt.
        result: the answer it was read from, with its metrics; outside equality and repr.
    """

    label: str = ""
    result: Result | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        return f"PointAnswer({self.label!r}, {self.count} points, truncated={self.truncated})"

    def as_dict(self) -> dict[str, Any]:
        """As `PointResult.as_dict`, with the label and the metrics."""
        return {
            "label": self.label,
            **super().as_dict(),
            "metrics": None if self.result is None else asdict(self.result.metrics),
        }


@dataclass(frozen=True)
class CountResult:
    """How many there are, and how that is known.

    Attributes:
        number: the count; None when the answer says nothing about it.
        how: ``"points"``: the number of points in the answer; ``"stated"``: it has no point but
            names a number; ``"none"``: it says that there are none; ``"unread"``: nothing of that.
        points: everything read from the answer, and the answer itself.
    """

    number: int | None
    how: How
    points: PointAnswer

    @property
    def consistent(self) -> bool | None:
        """Whether the stated number is the number of points; None unless there are both."""
        return self.points.consistent if self.points.points else None

    @property
    def truncated(self) -> bool:
        """Whether the answer was cut off; `number` is then a lower bound."""
        return self.points.truncated

    @property
    def result(self) -> Result | None:
        """The answer, with its metrics."""
        return self.points.result

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what was read from the answer stands under ``points``."""
        return {
            "number": self.number,
            "how": self.how,
            "consistent": self.consistent,
            "truncated": self.truncated,
            "points": self.points.as_dict(),
        }


def counted(points: PointAnswer) -> CountResult:
    """Points before words: what a model points at can be looked at."""
    if points.points:
        return CountResult(points.count, "points", points)
    if points.none_found and not points.stated_count:
        return CountResult(0, "none", points)
    if points.stated_count is not None:
        return CountResult(points.stated_count, "stated", points)
    return CountResult(None, "unread", points)
