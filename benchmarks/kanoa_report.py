"""The benchmark's three questions through kanoa, in this process, beside the 2025 report.

    python benchmarks/kanoa_report.py --model allenai/Molmo-7B-D-0924 \\
        --report benchmarks/results/2025-12-08-thor.json

The report came from kanoa through an HTTP server: output tokens by seconds of the whole request.
The same is measured here, around `AnalyticsInterpreter.interpret`; the report's own images were
never published.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness

from molmo_edge import EdgeVLM
from molmo_edge.bench.cases import Case, standard
from molmo_edge.bench.tables import UNKNOWN, number, table
from molmo_edge.integrations.kanoa import interpreter

Requests = Sequence[Mapping[str, float]]


def measure(reader: Any, cases: Sequence[Case], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Tokens and seconds, kanoa's own work included, of each request, by case."""
    requests: dict[str, list[dict[str, float]]] = {case.name: [] for case in cases}
    for _ in range(rounds):
        for case in cases:
            began = time.perf_counter()
            answer = reader.interpret(
                fig=case.image, custom_prompt=case.question, stream=False, display_result=False
            )
            seconds, usage = time.perf_counter() - began, answer.usage
            tokens = {"input_tokens": usage.input_tokens, "output_tokens": usage.output_tokens}
            requests[case.name].append({**tokens, "seconds": seconds})
    return requests


def reported(path: Path | None) -> dict[str, list[str]]:
    """The report's tok/s of a case, or "overall": of all its runs, and of runs 6 to 10."""
    if path is None:
        return {}
    [scenario] = json.loads(path.read_text(encoding="utf-8"))["scenarios"]
    parts = ("all", "steady")
    return {
        row["name"]: [number(row[part].get("request_tps", {}).get("mean")) for part in parts]
        for row in scenario["rows"]
    }


def markdown(requests: Mapping[str, Requests], report: Mapping[str, Sequence[str]]) -> str:
    """Markdown: output tokens, and tok/s of the first and the later requests, as means."""
    rows, absent = [], (UNKNOWN, UNKNOWN)
    for case in standard():
        asked = requests[case.name]
        cells = _cells(asked[:1], asked[1:])
        rows.append([case.title, *cells, *report.get(case.name, absent)])
    first = [one for asked in requests.values() for one in asked[:1]]
    later = [one for asked in requests.values() for one in asked[1:]]
    rows.append(["all cases", *_cells(first, later), *report.get("overall", absent)])
    ours = ["tok/s of whole requests", "output tokens", "first", "later", "all"]
    return table([*ours, "2025, all", "2025, runs 6 to 10"], rows)


def _cells(first: Requests, later: Requests) -> list[str]:
    every = [*first, *later]
    tokens = [int(one["output_tokens"]) for one in every]
    low, high = min(tokens), max(tokens)
    means = [
        statistics.mean(one["output_tokens"] / one["seconds"] for one in part) if part else None
        for part in (first, later, every)
    ]
    return [f"{low}" if low == high else f"{low} to {high}", *map(number, means)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="stub", help="checkpoint directory, hub name, or stub")
    parser.add_argument("--options", type=json.loads, default={}, help="of EdgeVLM, as JSON")
    parser.add_argument("--rounds", type=int, default=10, help="requests about each image")
    parser.add_argument("--tokens", type=int, default=300, help="at most, of an answer")
    parser.add_argument("--report", type=Path, help="a recorded report to stand beside")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    with EdgeVLM(arguments.model, **arguments.options) as vlm:
        reader = interpreter(vlm, max_tokens=arguments.tokens)
        requests = measure(reader, standard(), arguments.rounds)
        seen = dict(vlm.environment)
    print(markdown(requests, reported(arguments.report)))
    settings = {name: getattr(arguments, name) for name in ("model", "options", "rounds", "tokens")}
    document = harness.result("kanoa", settings=settings, environment=seen, result=requests)
    harness.write(document, arguments.output)


if __name__ == "__main__":
    harness.start(main)
