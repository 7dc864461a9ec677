"""``bench drift``: builds the reference and each other configuration in turn, and prints drift."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from molmo_edge.bench import drift, environment
from molmo_edge.bench.cases import Case
from molmo_edge.bench.command import Target
from molmo_edge.bench.drift import Bounds, CaseDrift, Drift, DriftDocument
from molmo_edge.bench.environment import software_line
from molmo_edge.bench.tables import UNKNOWN, markdown_table, number
from molmo_edge.errors import BenchmarkError

HEADS = ("case", "n", "equal", "differs", "|dlp|", "max |dlp|", "KL", "points", "px", "max px")
LEGEND = (
    "n: tokens scored; equal: share of equal greedy tokens; differs: first token in which free "
    "answers differ; dlp: difference of log-probability; KL: over the 20 likeliest tokens, nats; "
    "points: of the reference and the other; px: distance of the points in pixels"
)


def variants(target: Target, choices: Mapping[str, str | None]) -> list[tuple[str, Target]]:
    """(label, target) of the reference, first, and the others.

    ``choices`` are options of ``EdgeVLM`` to comma-separated values; exactly one has several.

    Raises:
        BenchmarkError: none or more than one option has several values.
    """
    lists = {
        name: [part.strip() for part in text.split(",") if part.strip()]
        for name, text in choices.items()
        if text is not None
    }
    several = [name for name, values in lists.items() if len(values) > 1]
    if len(several) != 1:
        raise BenchmarkError(
            "drift needs exactly one option with several values, the reference first, such as "
            "--kv-cache-dtype auto,fp8"
        )
    fixed = {name: values[0] for name, values in lists.items() if len(values) == 1}
    return [
        (
            f"{several[0]}={value}",
            replace(target, options={**target.options, **fixed, several[0]: value}),
        )
        for value in lists[several[0]]
    ]


def run(
    chosen: Sequence[tuple[str, Target]],
    cases: Sequence[Case],
    *,
    max_tokens: int,
    bounds: Bounds,
    opened: Callable[[Target], AbstractContextManager[Any]] = lambda target: target.open(True),
    progress: Callable[[str], None] = lambda text: None,
    save: Callable[[DriftDocument], None] = lambda document: None,
) -> DriftDocument:
    """Drift of every later configuration against the first; saved after each.

    Engines have their prefix cache on: scoring an answer is a request for each of its tokens.

    Raises:
        BenchmarkError: a number is out of range.
        MolmoEdgeError: an engine could not be started, or a prompt failed.
    """
    if max_tokens < 1 or not 0 <= bounds.min_equal <= 1 or not bounds.max_kl >= 0:
        raise BenchmarkError(
            "drift needs --max-tokens 1 or more, --min-equal 0 to 1, --max-kl 0 up"
        )
    name, target = chosen[0]
    progress(f"reference: {name}")
    with opened(target) as vlm:
        known = drift.answers(vlm, cases, max_tokens=max_tokens)
        document = DriftDocument(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            max_tokens=max_tokens,
            min_equal=bounds.min_equal,
            max_kl=bounds.max_kl,
            environment=environment.of(vlm),
        )
    for other, target in chosen[1:]:
        progress(other)
        with opened(target) as vlm:
            found = drift.against(vlm, known, max_tokens=max_tokens)
            where = environment.of(vlm)
        document.drifts.append(drift.together(name, other, where, found, bounds))
        save(document)
    return document


def line(case: CaseDrift) -> list[str]:
    """One prompt as cells under :data:`HEADS`."""
    points = f"{case.points_reference}/{case.points_other}"
    return [
        case.title,
        str(case.tokens),
        f"{case.equal_greedy:.1%}",
        UNKNOWN if case.first_divergence is None else str(case.first_divergence),
        f"{case.mean_abs_dlogprob:.2g}",
        f"{case.max_abs_dlogprob:.2g}",
        f"{case.mean_kl:.2g}",
        points if points != "0/0" else UNKNOWN,
        number(case.mean_px),
        number(case.max_px),
    ]


def grid(found: Drift) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of one configuration, without columns in which nothing is known."""
    lines = [line(case) for case in found.cases]
    kept = [i for i in range(len(HEADS)) if any(cells[i] != UNKNOWN for cells in lines)]
    return [HEADS[i] for i in kept], [[cells[i] for i in kept] for cells in lines]


def verdict(found: Drift, document: DriftDocument) -> str:
    """One sentence: the numbers that decide, the bounds, and whether they hold."""
    return (
        f"{found.other} against {found.reference}: {found.equal_greedy:.1%} equal greedy tokens "
        f"(at least {document.min_equal:.0%}), mean KL {found.mean_kl:.2g} (at most "
        f"{document.max_kl:g}): {'passed' if found.passed else 'FAILED'}"
    )


def markdown(document: DriftDocument) -> str:
    """The drift as Markdown."""
    model = document.environment.model
    weights = " (random weights)" if model.random_weights else ""
    out = [f"# Drift of {model.name}{weights}", "", software_line(document.environment)]
    for found in document.drifts:
        out += ["", f"## {found.other}", "", markdown_table(*grid(found)), ""]
        out += [f"{verdict(found, document)}.", "", f"{LEGEND}."]
    return "\n".join(out) + "\n"
