"""The 2025 report's three questions through kanoa, in this process, beside its figures.

    python benchmarks/kanoa_report.py --model allenai/Molmo-7B-D-0924 \\
        --report benchmarks/results/2025-12-08-thor.json

The report came from kanoa through an HTTP server: output tokens by seconds of the whole request.
The same is measured here at the same door, `AnalyticsInterpreter.interpret`.
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
from molmo_edge.bench.tables import UNKNOWN, table
from molmo_edge.integrations.kanoa import interpreter


def measure(reader: Any, cases: Sequence[Case], rounds: int) -> dict[str, list[float]]:
    """Output tokens per second of each request, by case, kanoa's own work included."""
    speeds: dict[str, list[float]] = {case.name: [] for case in cases}
    for _ in range(rounds):
        for case in cases:
            began = time.perf_counter()
            answer = reader.interpret(
                fig=case.image, custom_prompt=case.question, stream=False, display_result=False
            )
            speeds[case.name].append(answer.usage.output_tokens / (time.perf_counter() - began))
    return speeds


def reported(path: Path | None) -> Mapping[str, float]:
    """The report's mean over all runs and over the steady ones, by name."""
    if path is None:
        return {}
    [scenario] = json.loads(path.read_text(encoding="utf-8"))["scenarios"]
    row = next(one for one in scenario["rows"] if one["name"] == "overall")
    return {name: row[name]["request_tps"]["mean"] for name in ("all", "steady")}


def markdown(speeds: Mapping[str, Sequence[float]], report: Mapping[str, float]) -> str:
    """Markdown: tok/s of each case, and over all as the report has it."""
    titles = {case.name: case.title for case in standard()}
    later = {name: values[1:] or values for name, values in speeds.items()}
    rows = [
        [titles[name], f"{values[0]:.1f}", f"{statistics.mean(later[name]):.1f}", UNKNOWN]
        for name, values in speeds.items()
    ]
    every = [speed for values in speeds.values() for speed in values]
    steady = [speed for values in later.values() for speed in values]
    for title, values, name in (("all", every, "all"), ("all but the first", steady, "steady")):
        past = f"{report[name]:.1f}" if name in report else UNKNOWN
        rows.append([title, UNKNOWN, f"{statistics.mean(values):.1f}", past])
    return table(["", "first, tok/s", "later, tok/s", "2025, tok/s"], rows)


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
        speeds = measure(reader, standard(), arguments.rounds)
        seen = dict(vlm.environment)
    print(markdown(speeds, reported(arguments.report)))
    settings = {"model": arguments.model, "rounds": arguments.rounds, "tokens": arguments.tokens}
    document = harness.result("kanoa", settings=settings, environment=seen, result=speeds)
    harness.write(document, arguments.output)


if __name__ == "__main__":
    harness.start(main)
