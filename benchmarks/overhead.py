"""What `EdgeVLM` costs against bare `vllm.LLM`: time to first token, decode speed, µs per token.

    python benchmarks/overhead.py --output benchmarks/results/overhead-cpu.json

One engine answers both ways in turns, in changing order: through `EdgeVLM.stream` with a reader,
and by `LLM.generate` in the thread that owns the engine. So both sides have the same weights and
the same place in memory; two processes that do the same differ by a few percent for as long as they
live. `LLM.generate` is measured twice in every round: the second against the first is the noise
floor that stands beside every ratio. The whole is repeated in fresh processes (`--starts`).

`LLM.generate` does not report its first token, so both sides have the clock around the call: a
request of one token is the time to first token, and decode is what a long answer takes beyond the
median one-token answer to the same prompt. Images, slow on a CPU, come in every twelfth round. The
cost per token is the difference of the process's CPU time, engine thread and reader together; one
thread per engine (`--threads 1`) keeps waiting OpenMP threads out of it. Every image is a new one;
prefix, image and encoder caches are off.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness

from molmo_edge.bench.cases import Case, fresh, standard
from molmo_edge.bench.tables import UNKNOWN, table

DECODE_RATIO, TTFT_RATIO, COST_US = 0.97, 1.05, 100.0
"""Promised against bare vLLM: minimum of decode speed, maxima of TTFT and CPU time per token."""

SIDES = ("ours", "bare", "again")
TEXT = "Write a short story about a robot in a garden."
LIMIT_S = 3600.0
WARM_UP = 2
IMAGE_EVERY = 12
REST_S = 0.1
"""Between two requests, so that the side that ran lets its threads sleep."""

Answer = dict[str, Any]
Round = Mapping[str, Mapping[str, Answer]]


def ask_ours(vlm: Any, image: Any, text: str, tokens: int) -> Answer:
    """Through `EdgeVLM.stream`, read to its end."""
    stream = vlm.stream(image, text, max_tokens=tokens, ignore_eos=True)
    for _ in stream:
        pass
    result = stream.result()
    return {"tokens": len(result.token_ids), "prompt_tokens": result.metrics.prompt_tokens,
            "text": result.text}  # fmt: skip


def ask_bare(vlm: Any, image: Any, text: str, tokens: int) -> Answer:
    """By `LLM.generate`, in the thread that owns the engine."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0.0, max_tokens=tokens, ignore_eos=True, skip_reading_prefix_cache=True
    )

    def generate(engine: Any) -> Any:
        prompt: dict[str, Any] = {"prompt": f"User: {text} Assistant:"}
        if image is not None:
            prompt["multi_modal_data"] = {"image": image}
        else:
            # Without an image vLLM tokenises the bare string: no BOS, no space before it.
            tokenizer = engine.llm.get_tokenizer()
            bos = tokenizer.bos_token_id
            start = tokenizer.eos_token_id if bos is None else bos
            ids = tokenizer.encode(f" User: {text} Assistant:", add_special_tokens=False)
            prompt = {"prompt_token_ids": [start, *ids]}
        return engine.llm.generate(prompt, params, use_tqdm=False)[0]

    output = vlm.in_engine_thread(generate)
    answer = output.outputs[0]
    return {"tokens": len(answer.token_ids), "prompt_tokens": len(output.prompt_token_ids),
            "text": answer.text.removeprefix(" ")}  # fmt: skip


def timed(vlm: Any, side: str, case: Case, number: int | None, tokens: int) -> Answer:
    """One request on the common clocks; `number` makes the image a new one, None means text."""
    image = None if number is None or case.image is None else fresh(case.image, number)
    text = TEXT if image is None else case.question
    ask = ask_ours if side == "ours" else ask_bare
    cpu, began = time.process_time(), time.perf_counter()
    answer = ask(vlm, image, text, tokens)
    seconds = time.perf_counter() - began
    return {**answer, "seconds": seconds, "cpu_s": time.process_time() - cpu}


def measure_start(emit: harness.Emit, options: Mapping[str, Any]) -> None:
    """One process: emits its rounds, kind → side → answer, as they are measured."""
    from molmo_edge import EdgeVLM

    case, rounds, number = standard()[0], [], 0
    plan = {"image_first": (True, 1), "text_first": (False, 1),
            "text_long": (False, options["tokens"])}  # fmt: skip
    with EdgeVLM(**{**options["engine"], "enable_prefix_caching": False}) as vlm:
        emit("environment", dict(vlm.environment))
        ends = time.monotonic() + options["limit_s"]
        for turn in range(WARM_UP + options["pairs"]):
            if rounds and time.monotonic() >= ends:
                break
            order = SIDES if turn % 2 == 0 else SIDES[::-1]
            answers: dict[str, dict[str, Answer]] = {}
            for kind, (with_image, tokens) in plan.items():
                if with_image and turn > WARM_UP and (turn - WARM_UP) % IMAGE_EVERY:
                    continue
                answers[kind] = {}
                for side in order:
                    number += 1
                    image = number if with_image else None
                    answers[kind][side] = timed(vlm, side, case, image, tokens)
                    time.sleep(REST_S)
            if turn >= WARM_UP:
                rounds.append(answers)
                emit("rounds", rounds)


def series(rounds: Sequence[Round], side: str) -> dict[str, list[float]]:
    """A side's TTFT (s), decode speed (tok/s) and CPU time per token (µs) by round."""
    first_s, first_cpu_s = (
        statistics.median(one["text_first"][side][name] for one in rounds)
        for name in ("seconds", "cpu_s")
    )
    out: dict[str, list[float]] = {"ttft_s": [], "decode_tps": [], "cpu_us": []}
    for one in rounds:
        long = one["text_long"][side]
        later = long["tokens"] - one["text_first"][side]["tokens"]
        if "image_first" in one:
            out["ttft_s"].append(one["image_first"][side]["seconds"])
        out["decode_tps"].append(later / max(long["seconds"] - first_s, 1e-9))
        out["cpu_us"].append(1e6 * (long["cpu_s"] - first_cpu_s) / later)
    return out


def evaluate(starts: Sequence[Sequence[Round]]) -> dict[str, Any]:
    """Ours against bare, and bare against itself, over the rounds of every start."""
    sides: dict[str, dict[str, list[float]]] = {}
    for side in SIDES:
        each = [series(rounds, side) for rounds in starts]
        sides[side] = {name: [v for one in each for v in one[name]] for name in each[0]}
    ours, bare, again = (sides[side] for side in SIDES)
    out: dict[str, Any] = {}
    for name in ("ttft_s", "decode_tps"):
        out[name] = harness.paired_ratio(ours[name], bare[name])
        out[name]["floor"] = harness.paired_ratio(again[name], bare[name])
        out[name]["starts"] = [
            harness.paired_ratio(series(one, "ours")[name], series(one, "bare")[name])["median"]
            for one in starts
        ]
    out["cost_us"], out["cost_us"]["floor"] = (
        harness.median_interval([a - b for a, b in zip(one["cpu_us"], bare["cpu_us"], strict=True)])
        for one in (ours, again)
    )
    all_rounds = [one for rounds in starts for one in rounds]
    texts = [[one["text_long"][side]["text"] for side in SIDES[:2]] for one in all_rounds]
    out["equal_texts"] = statistics.mean(a == b for a, b in texts)
    out["equal_prompts"] = all(
        answers["ours"]["prompt_tokens"] == answers["bare"]["prompt_tokens"]
        for one in all_rounds
        for answers in one.values()
    )
    out["passed"] = (
        out["decode_tps"]["median"] >= DECODE_RATIO
        and out["ttft_s"]["median"] <= TTFT_RATIO
        and out["cost_us"]["median"] <= COST_US
    )
    return out


def run(
    engine: Mapping[str, Any],
    *,
    starts: int = 3,
    pairs: int = 48,
    tokens: int = 129,
    limit_s: float = LIMIT_S,
    threads: int = 0,
) -> dict[str, Any]:
    """Measure; `engine` has keyword arguments of `EdgeVLM`, the rest is that of the options."""
    plan = {"pairs": pairs, "tokens": tokens, "limit_s": limit_s}
    options = {"engine": engine, **plan}
    measured = harness.run_starts(
        __file__, options, starts=starts, limit_s=limit_s + 900, threads=threads
    )
    all_rounds = [values["rounds"] for values in measured]
    figures = evaluate(all_rounds)
    return harness.result(
        "overhead",
        settings={"engine": engine, "starts": starts, "threads": threads, **plan},
        environment=measured[-1]["environment"],
        result=figures,
        rounds=all_rounds,
    )


def markdown(figures: Mapping[str, Any]) -> str:
    """Markdown: ours against bare `vllm.LLM`, with the noise floor beside every figure."""
    rows = []
    for title, name, digits in (
        ("decode tok/s, ours ÷ bare", "decode_tps", 3),
        ("TTFT, ours ÷ bare", "ttft_s", 3),
        ("CPU µs per token, ours − bare", "cost_us", 1),
    ):
        one = figures[name]
        texts = [harness.interval_text(each, digits) for each in (one, one["floor"])]
        sides = f"{one['ours']:.3f}, {one['other']:.3f}" if "ours" in one else UNKNOWN
        rows.append([title, *texts, sides])
    return table(["", "ratio or cost", "bare against itself", "ours, bare"], rows)


def main() -> None:
    harness.serve_child({"start": measure_start})
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="stub", help="checkpoint directory, hub name, or stub")
    parser.add_argument("--options", type=json.loads, default={}, help="of EdgeVLM, as JSON")
    parser.add_argument("--starts", type=int, default=3, help="fresh processes")
    parser.add_argument("--pairs", type=int, default=48, help="rounds in each start")
    parser.add_argument("--tokens", type=int, default=129, help="of a long answer")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU engine; 0: vLLM's choice")
    parser.add_argument("--time-limit", type=float, default=LIMIT_S, help="seconds of each start")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    document = run(
        {"model": arguments.model, **arguments.options},
        starts=arguments.starts,
        pairs=arguments.pairs,
        tokens=arguments.tokens,
        threads=arguments.threads,
        limit_s=arguments.time_limit,
    )
    print(markdown(document["result"]))
    harness.write(document, arguments.output)
    sys.exit(0 if document["result"]["passed"] else 1)


if __name__ == "__main__":
    harness.start(main)
