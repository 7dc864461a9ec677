"""What a cheaper configuration does to the answers: the same prompts under two configurations.

The reference answers greedily. Its answers are then scored token by token under both
configurations, each token behind the reference's own tokens (teacher forcing), so that one early
difference does not hide the rest; both are scored in the same way, so that the way of scoring
cancels out. The other configuration also answers freely, for the first divergence and for where
its points lie. This module knows nothing about speed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from molmo_edge.bench.cases import Case, standard
from molmo_edge.bench.document import Environment
from molmo_edge.points import Point, parse_points
from molmo_edge.results import Score

TOP = 20
"""Candidates for each token, over which the divergence is taken."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class CaseDrift(_Part):
    """One prompt. Log-probabilities are natural; distances are pixels of the picture.

    ``equal_greedy`` is the share of places in the reference's answer at which both configurations
    find the same token likeliest, of the whole vocabulary. ``kl`` is the divergence of the other
    from the reference in nats, the 20 candidates and all the rest as one. ``first_divergence`` is
    the index of the first token in which free answers differ, null where they do not. Point
    distances pair nearest points first, and are null where one of the answers has none.
    """

    name: str
    title: str
    tokens: int
    equal_greedy: float
    first_divergence: int | None
    mean_abs_dlogprob: float
    max_abs_dlogprob: float
    mean_kl: float
    max_kl: float
    points_reference: int
    points_other: int
    mean_px: float | None
    max_px: float | None
    dlogprobs: list[float] = Field(default_factory=list)
    kls: list[float] = Field(default_factory=list)
    text_reference: str = ""
    text_other: str = ""


class Drift(_Part):
    """The other configuration against the reference, all prompts."""

    reference: str
    other: str
    environment: Environment
    equal_greedy: float
    mean_abs_dlogprob: float
    max_abs_dlogprob: float
    mean_kl: float
    passed: bool
    cases: list[CaseDrift]


class DriftDocument(_Part):
    """A whole drift result: one reference, and every other configuration against it."""

    format: Literal["molmo-edge-drift"] = "molmo-edge-drift"
    version: Literal[1] = 1
    created: str
    max_tokens: int
    min_equal: float
    max_kl: float
    environment: Environment
    drifts: list[Drift] = Field(default_factory=list)


@dataclass(frozen=True)
class Answered:
    """A reference answer and what the reference itself says about its tokens."""

    case: Case
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    candidates: tuple[Mapping[int, float], ...]
    greedy: tuple[int, ...]


@dataclass(frozen=True)
class Bounds:
    """What still passes: least share of equal greedy tokens, largest mean divergence in nats."""

    min_equal: float = 0.95
    max_kl: float = 0.05


def prompts() -> tuple[Case, ...]:
    """The standard cases, and pointing on two of their pictures."""
    first, panels, chart = standard()
    return (
        first,
        panels,
        chart,
        Case("point-trees", "Point: trees", "Point to the trees.", first.image),
        Case("point-dots", "Point: orange dots", "Point to the orange dots.", chart.image),
    )


def answers(vlm: Any, cases: Sequence[Case], *, max_tokens: int) -> list[Answered]:
    """The reference's greedy answers, scored by the reference."""
    out = []
    for case in cases:
        result = vlm.query(case.image, case.question, max_tokens=max_tokens, logprobs=TOP)
        top = [list(entry)[:TOP] for entry in result.top_logprobs]
        score = vlm.score(case.image, case.question, result.token_ids, candidates=top)
        out.append(
            Answered(
                case,
                result.text,
                result.token_ids,
                score.logprobs,
                score.candidates,
                score.greedy_token_ids,
            )
        )
    return out


def against(vlm: Any, references: Sequence[Answered], *, max_tokens: int) -> list[CaseDrift]:
    """The other configuration on the reference's answers."""
    out = []
    for known in references:
        case = known.case
        free = vlm.query(case.image, case.question, max_tokens=max_tokens)
        top = [list(entry) for entry in known.candidates]
        score = vlm.score(case.image, case.question, known.token_ids, candidates=top)
        size = (1, 1) if case.image is None else case.image.size
        out.append(compare_case(known, free.text, free.token_ids, score, size=size))
    return out


def compare_case(
    known: Answered,
    text: str,
    token_ids: Sequence[int],
    score: Score,
    *,
    size: tuple[int, int],
) -> CaseDrift:
    """One prompt's drift: the reference's numbers, and the other's free answer and `score`."""
    deltas = [b - a for a, b in zip(known.logprobs, score.logprobs, strict=True)]
    kls = [divergence(a, b) for a, b in zip(known.candidates, score.candidates, strict=True)]
    equal = [a == b for a, b in zip(known.greedy, score.greedy_token_ids, strict=True)]
    ours, theirs = parse_points(known.text).points, parse_points(text).points
    distances = paired_distances(ours, theirs, size)
    return CaseDrift(
        name=known.case.name,
        title=known.case.title,
        tokens=len(deltas),
        equal_greedy=sum(equal) / len(equal),
        first_divergence=first_difference(known.token_ids, token_ids),
        mean_abs_dlogprob=sum(map(abs, deltas)) / len(deltas),
        max_abs_dlogprob=max(map(abs, deltas)),
        mean_kl=sum(kls) / len(kls),
        max_kl=max(kls),
        points_reference=len(ours),
        points_other=len(theirs),
        mean_px=sum(distances) / len(distances) if distances else None,
        max_px=max(distances) if distances else None,
        dlogprobs=deltas,
        kls=kls,
        text_reference=known.text,
        text_other=text,
    )


def together(
    reference: str, other: str, environment: Environment, cases: list[CaseDrift], bounds: Bounds
) -> Drift:
    """All prompts of one configuration, every token counting the same."""
    tokens = sum(case.tokens for case in cases)
    equal, mean, kl = (
        sum(getattr(case, name) * case.tokens for case in cases) / tokens
        for name in ("equal_greedy", "mean_abs_dlogprob", "mean_kl")
    )
    return Drift(
        reference=reference,
        other=other,
        environment=environment,
        equal_greedy=equal,
        mean_abs_dlogprob=mean,
        max_abs_dlogprob=max(case.max_abs_dlogprob for case in cases),
        mean_kl=kl,
        passed=equal >= bounds.min_equal and kl <= bounds.max_kl,
        cases=cases,
    )


def divergence(reference: Mapping[int, float], other: Mapping[int, float]) -> float:
    """KL(reference || other) in nats over the reference's candidates and the rest as one.

    Lumping the rest can only lower a divergence, so this is a lower bound of the full one.
    """
    total, left_a, left_b = 0.0, 1.0, 1.0
    for token, a in reference.items():
        b = other[token]
        total += math.exp(a) * (a - b)
        left_a -= math.exp(a)
        left_b -= math.exp(b)
    # Rounding may leave a rest of zero or less.
    if left_a > 1e-9:
        total += left_a * math.log(left_a / max(left_b, 1e-9))
    return max(total, 0.0)


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Index of the first token that differs, also where one answer ends first."""
    pairs = enumerate(zip_longest(one, other))
    return next((i for i, (a, b) in pairs if a != b), None)


def paired_distances(
    ours: Sequence[Point], theirs: Sequence[Point], size: tuple[int, int]
) -> list[float]:
    """Distances in pixels of a picture of ``size`` (width, height), nearest pairs first."""
    width, height = size
    pairs = sorted(
        (math.hypot((a.x - b.x) * width, (a.y - b.y) * height), i, j)
        for i, a in enumerate(ours)
        for j, b in enumerate(theirs)
    )
    taken_a: set[int] = set()
    taken_b: set[int] = set()
    distances = []
    for distance, i, j in pairs:
        if i not in taken_a and j not in taken_b:
            taken_a.add(i)
            taken_b.add(j)
            distances.append(distance)
    return distances


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a drift document."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "molmo-edge-drift result, version 1",
        **{k: v for k, v in DriftDocument.model_json_schema().items() if k != "title"},
    }
