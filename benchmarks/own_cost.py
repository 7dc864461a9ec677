"""CPU time of molmo_edge's own code per token and per request, with a fake engine.

    python benchmarks/own_cost.py --output benchmarks/results/own-cost-cpu.json

`FakeEngine` sleeps in each step, so that engine thread and reader wake for every token as they do
with a real engine. Its own CPU time, measured without `EdgeVLM` around it in the same round, is
subtracted; that of a second such run is the noise floor. A request has a text and one token:
checks, hand-over, one step and result. Not in it: tokenising, images, converting vLLM's outputs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import harness

from molmo_edge import EdgeVLM
from molmo_edge.bench.tables import table
from molmo_edge.engine.fake import FakeEngine
from molmo_edge.interface import Turn
from molmo_edge.requests import check_options

TOKEN_US, REQUEST_MS = 100.0, 1.0
"""Promised maxima of CPU time."""

STEP_S = 0.001
ANSWER = "one two three four"


def wrapped_s(vlm: EdgeVLM, requests: int, tokens: int) -> float:
    """CPU time of answers read from streams, one after another."""
    began = time.process_time()
    for _ in range(requests):
        for _ in vlm.stream(None, "q", max_tokens=tokens, ignore_eos=True):
            pass
    return time.process_time() - began


def fake_s(fake: FakeEngine, requests: int, tokens: int) -> float:
    """CPU time of the same answers by the engine alone."""
    options = check_options({"max_tokens": tokens, "ignore_eos": True}, None)
    began = time.process_time()
    for _ in range(requests):
        fake.add("request", fake.render([Turn("user", "q")], {}), options)
        while fake.running:
            fake.step()
    return time.process_time() - began


def run(*, rounds: int, tokens: int, requests: int) -> dict[str, Any]:
    """Measure; the arguments are those of the options."""
    factory = FakeEngine.factory(ANSWER, max_model_len=10**6, step_s=STEP_S)
    alone = factory()
    series: dict[str, list[float]] = {"token_us": [], "request_ms": []}
    floors: dict[str, list[float]] = {"token_us": [], "request_ms": []}
    plans = (("token_us", 1, tokens, 1e6 / tokens), ("request_ms", requests, 1, 1e3 / requests))
    with EdgeVLM(engine=factory) as vlm:
        for number in range(rounds + 1):
            for name, count, length, scale in plans:
                ours = wrapped_s(vlm, count, length)
                first, second = (fake_s(alone, count, length) for _ in range(2))
                if number:  # the first one warms up
                    series[name].append(scale * (ours - first))
                    floors[name].append(scale * (second - first))
    figures: dict[str, Any] = {
        name: {
            **harness.median_interval(values),
            "floor": harness.median_interval(floors[name]),
        }
        for name, values in series.items()
    }
    figures["passed"] = (
        figures["token_us"]["median"] <= TOKEN_US and figures["request_ms"]["median"] <= REQUEST_MS
    )
    return harness.result(
        "own-cost",
        settings={"rounds": rounds, "tokens": tokens, "requests": requests, "step_s": STEP_S},
        result=figures,
        rounds={"ours": series, "floor": floors},
    )


def markdown(figures: Mapping[str, Any]) -> str:
    """Markdown: each cost beside its noise floor and what is promised."""
    rows = [
        [title, *(harness.interval_text(one, digits) for one in (cost, cost["floor"])), most]
        for title, cost, digits, most in (
            ("CPU µs per token", figures["token_us"], 1, f"{TOKEN_US:.0f}"),
            ("CPU ms per request", figures["request_ms"], 2, f"{REQUEST_MS:.0f}"),
        )
    ]
    return table(["", "molmo_edge", "floor", "at most"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds")
    parser.add_argument("--tokens", type=int, default=1000, help="of a long answer")
    parser.add_argument("--requests", type=int, default=300, help="of one token, in a round")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    document = run(rounds=arguments.rounds, tokens=arguments.tokens, requests=arguments.requests)
    print(markdown(document["result"]))
    harness.write(document, arguments.output)
    sys.exit(0 if document["result"]["passed"] else 1)


if __name__ == "__main__":
    harness.start(main)
