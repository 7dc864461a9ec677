"""Many images at once: `EdgeVLM.batch` against inputs prepared beforehand, and `LLM.generate`.

    python benchmarks/bulk.py --output benchmarks/results/bulk-cpu.json

One engine answers the same images in turns, in changing order: by `EdgeVLM.batch`, which prepares
images while the engine runs; as inputs that were all prepared before the clock started, twice, the
second against the first being the noise floor; and by `LLM.generate`, which prepares every image
before the first is answered. The whole is repeated in fresh processes (`--starts`). Prefix, image
and encoder caches are off.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np
from PIL import Image

from molmo_edge.bench.tables import table

BATCH_RATIO, GENERATE_RATIO = 0.95, 1.0
"""Promised minimum of `batch`'s rate over that of prepared inputs and of `LLM.generate`."""

SIDES = ("batch", "prepared", "again", "generate")
RATIOS = {
    "of_prepared": ("batch", "prepared"),
    "floor": ("again", "prepared"),
    "of_generate": ("batch", "generate"),
}
TEXT = "Describe this image."
LIMIT_S = 3600.0
WARM_UP = 4  # requests

Round = Mapping[str, float]


def noise(count: int) -> list[Image.Image]:
    """Different images of 640 x 480 pixels."""
    random = np.random.default_rng(0)
    size = (480, 640, 3)
    return [Image.fromarray(random.integers(0, 256, size, dtype=np.uint8)) for _ in range(count)]


def answer_batch(vlm: Any, images: Sequence[Image.Image], tokens: int) -> Callable[[], list[int]]:
    """What asks by `EdgeVLM.batch`; it returns each prompt's tokens."""
    from molmo_edge import Request

    requests = [Request(one, TEXT, max_tokens=tokens, ignore_eos=True) for one in images]
    return lambda: [one.metrics.prompt_tokens for one in vlm.batch(requests)]


def answer_prepared(
    vlm: Any, images: Sequence[Image.Image], tokens: int
) -> Callable[[], list[int]]:
    """What hands the engine requests that are prepared here, by `EdgeVLM`'s own steps."""
    from molmo_edge import Request

    loop, pending = vlm._loop, []
    for image in images:
        request = Request(image, TEXT, max_tokens=tokens, ignore_eos=True)
        options = vlm._check(request)
        rendered = vlm._render(loop, vlm._read(request), options)
        pending.append(vlm._pending(loop, rendered, options))

    def answer() -> list[int]:
        streams = [vlm._submit(loop, one, wait=True) for one in pending]
        return [stream.result().metrics.prompt_tokens for stream in streams]

    return answer


def answer_generate(
    vlm: Any, images: Sequence[Image.Image], tokens: int
) -> Callable[[], list[int]]:
    """What asks by `LLM.generate`, in the thread that owns the engine."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0.0, max_tokens=tokens, ignore_eos=True, skip_reading_prefix_cache=True
    )
    text = f"User: {TEXT} Assistant:"
    if vlm.family.name == "molmo2":
        text = f"<|image|><|im_start|>user\n{TEXT}<|im_end|>\n<|im_start|>assistant\n"
    prompts = [{"prompt": text, "multi_modal_data": {"image": image}} for image in images]

    def answer() -> list[int]:
        outputs = vlm.in_engine_thread(
            lambda engine: engine.llm.generate(prompts, params, use_tqdm=False)
        )
        return [len(one.prompt_token_ids) for one in outputs]

    return answer


PREPARE = {
    "batch": answer_batch,
    "prepared": answer_prepared,
    "again": answer_prepared,
    "generate": answer_generate,
}


def measure_start(emit: harness.Emit, options: Mapping[str, Any]) -> None:
    """One process: emits its rounds, side → seconds, as they are measured."""
    from molmo_edge import EdgeVLM

    images, rounds = noise(options["images"]), []
    with EdgeVLM(**{**options["engine"], "enable_prefix_caching": False}) as vlm:
        emit("environment", dict(vlm.environment))
        for side in SIDES:
            PREPARE[side](vlm, images[:WARM_UP], options["tokens"])()

        def prepare(side: str) -> Callable[[], list[int]]:
            return PREPARE[side](vlm, images, options["tokens"])

        timed = harness.timed_rounds(SIDES, prepare, vlm.reset_caches, options["rounds"])
        for seconds, prompts in timed:
            rounds.append(seconds)
            emit("rounds", rounds)
            emit("equal_prompts", prompts["batch"] == prompts["generate"])


def evaluate(starts: Sequence[Sequence[Round]], images: int) -> dict[str, Any]:
    """Rates of the sides, in images per second, and their ratios over the rounds of every start."""
    out = harness.rate_ratios(starts, images, RATIOS)
    out["passed"] = (
        out["of_prepared"]["median"] >= BATCH_RATIO
        and out["of_generate"]["median"] > GENERATE_RATIO
    )
    return out


def run(
    engine: Mapping[str, Any], *, starts: int, rounds: int, images: int, tokens: int, threads: int
) -> dict[str, Any]:
    """Measure; `engine` has keyword arguments of `EdgeVLM`, the rest is that of the options."""
    plan = {"rounds": rounds, "images": images, "tokens": tokens}
    options = {"engine": engine, **plan}
    measured = harness.run_starts(
        __file__, options, starts=starts, limit_s=LIMIT_S, threads=threads
    )
    all_rounds = [values["rounds"] for values in measured]
    equal = all(values["equal_prompts"] for values in measured)
    return harness.result(
        "bulk",
        settings={"engine": engine, "starts": starts, "threads": threads, **plan},
        environment=measured[-1]["environment"],
        result={**evaluate(all_rounds, images), "equal_prompts": equal},
        rounds=all_rounds,
    )


def markdown(*documents: Mapping[str, Any]) -> str:
    """Markdown: the rate of `batch`, and its ratios to the other sides."""
    rows = [harness.rate_row(one["settings"], one["result"], "batch", RATIOS) for one in documents]
    heads = ["", "images", "images/s", "÷ prepared", "floor", "÷ LLM.generate"]
    return table(heads, rows)


def main() -> None:
    harness.serve_child({"start": measure_start})
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo", help="checkpoint directory, hub name, or stub")
    parser.add_argument("--options", type=json.loads, default={}, help="of EdgeVLM, as JSON")
    parser.add_argument("--starts", type=int, default=3, help="fresh processes")
    parser.add_argument("--rounds", type=int, default=4, help="in each start")
    parser.add_argument("--images", type=int, default=200, help="different images")
    parser.add_argument("--tokens", type=int, default=8, help="of each answer")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU engine; 0: vLLM's choice")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    document = run(
        {"model": arguments.model, **arguments.options},
        starts=arguments.starts,
        rounds=arguments.rounds,
        images=arguments.images,
        tokens=arguments.tokens,
        threads=arguments.threads,
    )
    print(markdown(document))
    harness.write(document, arguments.output)
    sys.exit(0 if document["result"]["passed"] else 1)


if __name__ == "__main__":
    harness.start(main)
