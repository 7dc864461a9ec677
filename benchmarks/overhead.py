"""What `EdgeVLM` costs: against bare `vllm.LLM.generate`, and beside vLLM's server over HTTP.

Each side has a process of its own, as its user would, on the same engine arguments, checkpoint,
plugin and pictures. The processes are asked in turns within one run, in changing order, one request
at a time, while the others block on a pipe: alternating engines inside one process would make them
share its thread pools and its lock. Every picture is a new one, and prefix, picture and encoder
caches are off.

`LLM.generate` does not tell when its first token came, so all sides are measured alike, with the
clock around the call: a request of one token is the time to first token, and decode speed is what a
long answer takes beyond one-token answers to the same prompt. Those count by the median of the
side's rounds: one that the machine held up would make the long answer beside it look fast.

Two processes that do the same differ by a few percent for as long as they live, by where their
memory came to lie. So every side is started anew, several times, and the pairs of all are counted.

    python benchmarks/overhead.py --http --output benchmarks/results/overhead-cpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from _pairs import compare, steady_from
from _sides import Process, threads_environment

from molmo_edge.bench.document import write_bytes
from molmo_edge.bench.environment import device_of, versions
from molmo_edge.engine.build import engine_device
from molmo_edge.errors import MolmoEdgeError

DECODE_RATIO, TTFT_RATIO = 0.97, 1.05
"""What is promised against bare vLLM: least share of its decode speed, most of its TTFT."""

KINDS = {
    "picture_first": "a new picture, one token: time to first token",
    "text_first": "text, one token",
    "text_long": "the same text, a long answer",
    "picture_long": "a new picture, a long answer: a whole request",
}
CACHES_OFF = {"enable_prefix_caching": False, "mm_processor_cache_gb": 0.0}

Ask = Callable[[int | None, int], dict[str, Any]]
Round = Mapping[str, Mapping[str, Mapping[str, Any]]]


def rounds(
    sides: Mapping[str, Ask],
    *,
    count: int,
    decode_tokens: int,
    request_tokens: int,
    rest_s: float,
    deadline: float = float("inf"),
    progress: Callable[[str], None] = lambda text: None,
    sleep: Callable[[float], None] = time.sleep,
    first_number: int = 1,
) -> list[dict[str, dict[str, Any]]]:
    """Asks every side every kind of request, `count` times or until the deadline.

    Returns one entry for each whole round: kind → side → the side's answer. Within a kind the sides
    follow each other directly, and who is first changes from round to round.
    """
    done = []
    names = list(sides)
    number = first_number
    plan = {
        "picture_first": (True, 1),
        "text_first": (False, 1),
        "text_long": (False, decode_tokens),
        "picture_long": (True, request_tokens),
    }
    for turn in range(count):
        if time.monotonic() >= deadline:
            break
        found: dict[str, dict[str, Any]] = {}
        for kind, (picture, tokens) in plan.items():
            number += 1
            order = names if turn % 2 == 0 else names[::-1]
            found[kind] = {}
            for name in order:
                found[kind][name] = sides[name](number if picture else None, tokens)
                # The one that just worked lets its threads fall asleep.
                sleep(rest_s)
        done.append(found)
        progress(f"round {turn + 1} of {count}")
    return done


def series_of(done: Sequence[Round], side: str) -> dict[str, list[float]]:
    """A side's TTFT, request time (seconds) and decode speed (tokens a second) by round."""
    out: dict[str, list[float]] = {"ttft_s": [], "decode_tps": [], "request_s": [], "cpu_ms": []}
    first_s, first_cpu_s = (
        statistics.median(one["text_first"][side][name] for one in done)
        for name in ("seconds", "cpu_s")
    )
    for one in done:
        first, long = one["text_first"][side], one["text_long"][side]
        later = long["output_tokens"] - first["output_tokens"]
        out["ttft_s"].append(one["picture_first"][side]["seconds"])
        out["decode_tps"].append(later / max(long["seconds"] - first_s, 1e-9))
        out["request_s"].append(one["picture_long"][side]["seconds"])
        out["cpu_ms"].append(1e3 * (long["cpu_s"] - first_cpu_s) / later)
    return out


def evaluate(starts: Sequence[Sequence[Round]], other: str) -> dict[str, Any]:
    """Ours against one other side, over the steady rounds of every start."""
    mine: dict[str, list[float]] = {}
    theirs: dict[str, list[float]] = {}
    each = []
    for done in starts:
        here, there = series_of(done, "ours"), series_of(done, other)
        first, settled = steady_from([here["decode_tps"], there["decode_tps"]])
        for name in here:
            mine.setdefault(name, []).extend(here[name][first:])
            theirs.setdefault(name, []).extend(there[name][first:])
        ratio = compare(here["decode_tps"][first:], there["decode_tps"][first:])["median"]
        each.append({"steady_from_round": first, "settled": settled, "decode_tps": ratio})
    out: dict[str, Any] = {"starts": each}
    for name in ("ttft_s", "decode_tps", "request_s"):
        out[name] = compare(mine[name], theirs[name])
    if other != "http":  # its engine is another process than the one that is asked
        out["cpu_ms_per_token"] = compare(mine["cpu_ms"], theirs["cpu_ms"])
    rounds_of_all = [one for done in starts for one in done]
    pairs = [(one[kind]["ours"], one[kind][other]) for one in rounds_of_all for kind in KINDS]
    same = [a["text"] == b["text"] for a, b in pairs]
    out["equal_answers"] = sum(same) / len(same)
    out["equal_prompt_lengths"] = all(a["prompt_tokens"] == b["prompt_tokens"] for a, b in pairs)
    if other == "bare":
        out["passed"] = (
            out["decode_tps"]["median"] >= DECODE_RATIO and out["ttft_s"]["median"] <= TTFT_RATIO
        )
    return out


def run(
    options: Mapping[str, Any],
    *,
    starts: int = 3,
    pairs: int = 36,
    warm_up: int = 2,
    http: bool = False,
    decode_tokens: int = 513,
    request_tokens: int = 128,
    rest_s: float = 0.3,
    time_limit_s: float = float("inf"),
    threads: int | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Starts the sides, measures them in turns and returns the result document.

    Args:
        options: keyword arguments of `EdgeVLM`.
        starts: how often every side is started.
        pairs: rounds in all, shared out among the starts.
        warm_up: rounds of each start that are not counted, beside those the change-point rule
            leaves out.
        rest_s: seconds between two requests.
        time_limit_s: no round begins later than this after the first sides are up.
        threads: of each CPU engine; None leaves them to vLLM. One, where other programs compute.
    """
    if not 1 <= starts <= pairs or min(decode_tokens, request_tokens) < 2:
        raise MolmoEdgeError("overhead needs two tokens, one start, and one pair for each start.")
    names = ["ours", "bare", *(["http"] if http else [])]
    asked = {**options, **CACHES_OFF}
    plan: dict[str, Any] = {
        "decode_tokens": decode_tokens,
        "request_tokens": request_tokens,
        "rest_s": rest_s,
    }
    load = os.getloadavg()
    deadline = float("inf")
    done: list[list[dict[str, dict[str, Any]]]] = []
    for start in range(starts):
        if time.monotonic() >= deadline:
            break
        with _sides_up(names, asked, threads, progress) as (asks, told):
            if start == 0:
                deadline = time.monotonic() + time_limit_s
            rounds(asks, count=warm_up, **plan)
            found = rounds(
                asks,
                count=pairs // starts + (start < pairs % starts),
                **plan,
                deadline=deadline,
                progress=lambda text, start=start: progress(f"start {start + 1}, {text}"),  # type: ignore[misc]
                first_number=1 + len(KINDS) * warm_up,
            )
        if found:
            done.append(found)
    if not done:
        raise MolmoEdgeError("the time limit passed before a single round was measured.")
    texts = {name: [_without_texts(found, name) for found in done] for name in names}
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "kinds": KINDS,
        "settings": {
            "starts": starts,
            "pairs": pairs,
            "warm_up": warm_up,
            "threads": threads,
            **plan,
        },
        "promised": {"decode_tps": f">= {DECODE_RATIO}", "ttft_s": f"<= {TTFT_RATIO}"},
        "software": versions().model_dump(),
        "device": device_of(engine_device()).model_dump(),
        # By its name: where it lies is nobody's business.
        "engine_args": {**told["ours"]["llm_args"], "model": options.get("model", "stub")},
        "environment": told["ours"]["environment"],
        "machine": {
            "cpu_count": os.cpu_count(),
            "load_before": load,
            "load_after": os.getloadavg(),
            "nice": os.nice(0),
        },
        "against": {other: evaluate(done, other) for other in names[1:]},
        "rounds": texts,
    }


@contextmanager
def _sides_up(
    names: Sequence[str],
    options: Mapping[str, Any],
    threads: int | None,
    progress: Callable[[str], None],
) -> Iterator[tuple[dict[str, Ask], dict[str, Any]]]:
    """A fresh process for each side: how to ask it, and what it says of itself."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="overhead-")))
        asks: dict[str, Ask] = {}
        told = {}
        for name in names:  # one after another: two starts at once would disturb each other
            progress(f"starting {name}")
            side = Process(name, options, folder / f"{name}.log", threads_environment(threads))
            stack.callback(side.close)
            told[name] = side.ready()
            asks[name] = side.ask
        yield asks, told


def _without_texts(done: Sequence[Mapping[str, Any]], side: str) -> list[dict[str, Any]]:
    """The raw samples of a side."""
    return [
        {kind: {k: v for k, v in one[kind][side].items() if k != "text"} for kind in KINDS}
        for one in done
    ]


def table(document: Mapping[str, Any]) -> str:
    """Markdown: ours ÷ other, with intervals."""
    lines = [
        "| ours ÷ | TTFT | decode tok/s | whole request | TTFT, ours and other | tok/s |",
        "|---|---|---|---|---|---|",
    ]
    for other, found in document["against"].items():
        cells = [_ratio(found[name]) for name in ("ttft_s", "decode_tps", "request_s")]
        ttft, decode = found["ttft_s"], found["decode_tps"]
        cells.append(f"{ttft['ours_median']:.3f} s, {ttft['other_median']:.3f} s")
        cells.append(f"{decode['ours_median']:.1f}, {decode['other_median']:.1f}")
        lines.append(f"| {other} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio(found: Mapping[str, Any]) -> str:
    if found["low"] is None:
        return f"{found['median']:.3f}"
    return f"{found['median']:.3f} ({found['low']:.3f}–{found['high']:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="stub", help="checkpoint folder, hub name, or stub")
    parser.add_argument("--config", help="a deployment, like configs/thor.toml")
    parser.add_argument("--options", type=json.loads, default={}, help="more of EdgeVLM, as JSON")
    parser.add_argument("--http", action="store_true", help="vLLM's server too (loopback only)")
    parser.add_argument("--starts", type=int, default=3, help="of every side's process")
    parser.add_argument("--pairs", type=int, default=36, help="rounds, shared out among the starts")
    parser.add_argument("--decode-tokens", type=int, default=513)
    parser.add_argument("--request-tokens", type=int, default=128)
    parser.add_argument("--warm-up", type=int, default=2, help="rounds that are not counted")
    parser.add_argument("--threads", type=int, help="of each CPU engine; 1 on a busy machine")
    parser.add_argument("--rest", type=float, default=0.3, help="seconds between requests")
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    asked = parser.parse_args()
    options = {"model": asked.model, "config": asked.config, **asked.options}
    try:
        document = run(
            {name: value for name, value in options.items() if value is not None},
            starts=asked.starts,
            pairs=asked.pairs,
            http=asked.http,
            decode_tokens=asked.decode_tokens,
            request_tokens=asked.request_tokens,
            rest_s=asked.rest,
            warm_up=asked.warm_up,
            threads=asked.threads,
            time_limit_s=asked.time_limit,
            progress=lambda text: print(text, file=sys.stderr, flush=True),
        )
        print(table(document))
        if asked.output is not None:
            document["command"] = " ".join(["python", "benchmarks/overhead.py", *sys.argv[1:]])
            write_bytes(f"{json.dumps(document, indent=1)}\n".encode(), asked.output)
    except MolmoEdgeError as exc:
        sys.exit(f"error: {exc}")
    sys.exit(0 if document["against"]["bare"]["passed"] else 1)


if __name__ == "__main__":
    main()
