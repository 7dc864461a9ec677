"""Effect of a cheaper configuration on the answers: the same prompts under two configurations.

The reference configuration answers greedily. Its answers are then scored token by token under both
configurations, each token after the reference's own tokens (teacher forcing), so that one early
difference does not hide the rest. The other configuration also answers freely, for the first
divergence and for the positions of its points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, Literal

from pydantic import Field

from molmo_edge.bench import environment, tables
from molmo_edge.bench.cases import Case, shipped, standard
from molmo_edge.bench.document import Environment, Part, now
from molmo_edge.bench.environment import Target
from molmo_edge.bench.tables import UNKNOWN, number
from molmo_edge.errors import BenchmarkError
from molmo_edge.points import Point, parse_points
from molmo_edge.results import Result, Score, first_difference

TOP = 20
"""Candidates for each token, over which the divergence is taken."""


class CaseDrift(Part):
    """One prompt.

    ``equal_greedy`` is the fraction of positions in the reference's answer at which both
    configurations find the same token likeliest, of the whole vocabulary. ``first_divergence`` is
    the index of the first token in which free answers differ, null where they do not. Differences
    of log-probabilities and the divergence of the other from the reference are in nats, the latter
    over the 20 candidates and all the rest as one. ``mean_px`` is the distance in pixels from a
    point of the reference to the nearest of the other, null where one of the answers has none.
    """

    name: str
    tokens: int
    equal_greedy: float
    first_divergence: int | None
    mean_abs_dlogprob: float
    max_abs_dlogprob: float
    mean_kl: float
    points_reference: int
    points_other: int
    mean_px: float | None
    text_reference: str
    text_other: str


class Drift(Part):
    """The other configuration against the reference, all prompts, every token counting the same."""

    other: str
    equal_greedy: float
    mean_kl: float
    passed: bool
    cases: list[CaseDrift]


class DriftDocument(Part):
    """A whole drift result: one reference, and every other configuration against it."""

    format: Literal["molmo-edge-drift"] = "molmo-edge-drift"
    version: Literal[2] = 2
    created: str
    reference: str
    max_tokens: int
    min_equal: float
    max_kl: float
    environment: Environment
    drifts: list[Drift] = Field(default_factory=list)


def prompts() -> tuple[Case, ...]:
    """The standard cases, pointing on two of their images, and a drawn scene."""
    cases, scene = standard(), shipped("scene.png")
    return (
        *cases,
        Case("point-trees", "Point: trees", "Point to the trees.", cases[0].image),
        Case("point-dots", "Point: orange dots", "Point to the orange dots.", cases[2].image),
        Case("point-scene", "Point: red circles", "Point to the red circles.", scene),
        Case("caption-scene", "Drawn scene", "Describe this image.", scene),
    )


def answer_all(
    vlm: Any, cases: Sequence[Case], *, max_tokens: int
) -> list[tuple[Case, Result, Score]]:
    """The reference's greedy answers, scored by the reference."""
    out = []
    for case in cases:
        result = vlm.query(case.image, case.question, max_tokens=max_tokens, logprobs=TOP)
        top = [list(entry)[:TOP] for entry in result.top_logprobs]
        score = vlm.score(case.image, case.question, result.token_ids, candidates=top)
        out.append((case, result, score))
    return out


def against(vlm: Any, case: Case, result: Result, known: Score, *, max_tokens: int) -> CaseDrift:
    """The other configuration on one of the reference's answers."""
    free = vlm.query(case.image, case.question, max_tokens=max_tokens)
    top = [list(entry) for entry in known.candidates]
    score = vlm.score(case.image, case.question, result.token_ids, candidates=top)
    deltas = [abs(b - a) for a, b in zip(known.logprobs, score.logprobs, strict=True)]
    greedy = zip(known.greedy_token_ids, score.greedy_token_ids, strict=True)
    ours, theirs = parse_points(result.text).points, parse_points(free.text).points
    return CaseDrift(
        name=case.name,
        tokens=len(deltas),
        equal_greedy=fmean(a == b for a, b in greedy),
        first_divergence=first_difference(result.token_ids, free.token_ids),
        mean_abs_dlogprob=fmean(deltas),
        max_abs_dlogprob=max(deltas),
        mean_kl=fmean(map(divergence, known.candidates, score.candidates)),
        points_reference=len(ours),
        points_other=len(theirs),
        mean_px=mean_distance(ours, theirs, case.image.size) if case.image else None,
        text_reference=result.text,
        text_other=free.text,
    )


def compare(
    vlm: Any,
    other: str,
    known: Sequence[tuple[Case, Result, Score]],
    max_tokens: int,
    min_equal: float = 0.95,
    max_kl: float = 0.05,
) -> Drift:
    """Another configuration on all of the reference's answers, as ``answer_all`` returns them."""
    cases = [against(vlm, *one, max_tokens=max_tokens) for one in known]
    tokens = [case.tokens for case in cases]
    equal = fmean((case.equal_greedy for case in cases), tokens)
    kl = fmean((case.mean_kl for case in cases), tokens)
    passed = equal >= min_equal and kl <= max_kl
    return Drift(other=other, equal_greedy=equal, mean_kl=kl, passed=passed, cases=cases)


def divergence(reference: Mapping[int, float], other: Mapping[int, float]) -> float:
    """KL(reference || other) in nats, of which lumping the rest gives a lower bound."""
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


def mean_distance(
    ours: Sequence[Point], theirs: Sequence[Point], size: tuple[int, int]
) -> float | None:
    """From each of our points to the nearest of theirs, in pixels of an image (width, height)."""
    if not ours or not theirs:
        return None
    width, height = size
    return fmean(
        min(math.hypot((a.x - b.x) * width, (a.y - b.y) * height) for b in theirs) for a in ours
    )


def run(
    chosen: Mapping[str, Target],
    cases: Sequence[Case],
    *,
    max_tokens: int = 64,
    min_equal: float = 0.95,
    max_kl: float = 0.05,
    progress: Callable[[str], object] = lambda text: None,
    save: Callable[[DriftDocument], object] = lambda document: None,
) -> DriftDocument:
    """Drift of every later configuration against the first; saved after each.

    Raises BenchmarkError if there is only one configuration, and what an engine or prompt raises.
    """
    reference, *others = chosen
    if not others:
        raise BenchmarkError(
            "drift needs an option with several values, the reference first, such as "
            "--kv-cache-dtype auto,fp8"
        )
    progress(f"reference: {reference}")
    # With prefix cache: scoring an answer is a request for each of its tokens.
    with chosen[reference].open(True) as vlm:
        known = answer_all(vlm, cases, max_tokens=max_tokens)
        document = DriftDocument(
            created=now(),
            reference=reference,
            max_tokens=max_tokens,
            min_equal=min_equal,
            max_kl=max_kl,
            environment=environment.of(vlm),
        )
    for other in others:
        progress(other)
        with chosen[other].open(True) as vlm:
            drift = compare(vlm, other, known, max_tokens, min_equal, max_kl)
        document.drifts.append(drift)
        save(document)
    return document


HEADS = ("case", "n", "equal", "differs", "|dlp|", "max |dlp|", "KL", "points", "px")
LEGEND = (
    "n: tokens scored; equal: fraction of equal greedy tokens; differs: first token in which free "
    "answers differ; dlp: difference of log-probability; KL: over the 20 likeliest tokens, nats; "
    "points: of the reference and the other; px: from a point to the nearest of the other"
)


def markdown(document: DriftDocument) -> str:
    """For each configuration a table and a verdict."""
    model = document.environment.model
    weights = " (random weights: says nothing about trained ones)" if model.random_weights else ""
    parts = [f"# Drift of {tables.escape(model.name or UNKNOWN)}{weights}"]
    parts.append(tables.items([environment.software_line(document.environment)]))
    for drift in document.drifts:
        lines = []
        for case in drift.cases:
            points = f"{case.points_reference}/{case.points_other}"
            lines.append(
                [
                    case.name,
                    str(case.tokens),
                    f"{case.equal_greedy:.1%}",
                    number(case.first_divergence, 0),
                    f"{case.mean_abs_dlogprob:.2g}",
                    f"{case.max_abs_dlogprob:.2g}",
                    f"{case.mean_kl:.2g}",
                    UNKNOWN if points == "0/0" else points,
                    number(case.mean_px),
                ]
            )
        verdict = (
            f"{drift.other} against {document.reference}: {drift.equal_greedy:.1%} equal greedy "
            f"tokens (at least {document.min_equal:.0%}), mean KL {drift.mean_kl:.2g} (at most "
            f"{document.max_kl:g}): {'passed' if drift.passed else 'FAILED'}"
        )
        parts += [f"## {tables.escape(drift.other)}", tables.table(HEADS, lines)]
        parts.append(tables.items([verdict]))
    return tables.page([*parts, tables.items([LEGEND])])
