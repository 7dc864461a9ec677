"""What `gpu_check.py` measures, one function a stage; each case runs in a process of its own.

A function tells what it found bit by bit (`tell(name, value)`), so that a time limit or a crash
leaves what was measured before it. Values are JSON; unknown is None.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Tell = Callable[[str, Any], None]
Options = Mapping[str, Any]

QUESTION = "Describe this image in detail."
# Height and width: one tile, so 2 crops with the global view, and a 4:3 picture of 13.
TWO_CROPS, THIRTEEN_CROPS = (336, 336), (1152, 1536)


def picture(seed: int, size: tuple[int, int]) -> Any:
    """Noise that no cache has seen, H×W×3 uint8."""
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def verify(tell: Tell, options: Options) -> None:
    """Verdicts of `reference.verify` for one combination of dtype, backends, KV and weights."""
    from molmo_edge.reference.verify import default_images
    from molmo_edge.reference.verify import verify as prove

    given = dict(options)
    small = given.pop("small", False)
    pictures = default_images()
    if small:
        pictures = {name: pictures[name] for name in ("small", "text only")}
    tokens = 4 if small else 12
    for report in prove(images=pictures, max_tokens=tokens, **given):
        tell(
            "stock" if report.stock else "ours",
            {
                "ok": report.ok,
                "exact": report.exact,
                "bound": report.bound,
                "max_dlogprob": max(case.max_dlogprob for case in report.cases),
                "cases": [vars(case) for case in report.cases],
            },
        )


def copy(tell: Tell, options: Options) -> None:
    """Bytes a second that a large copy within the device's memory reads and writes together."""
    import torch

    cuda = options["device"] == "cuda"
    count = int(options["bytes"])
    source = torch.ones(count, dtype=torch.uint8, device=options["device"])
    target = torch.empty_like(source)

    def seconds() -> float:
        began = time.perf_counter()
        target.copy_(source)
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    for _ in range(3):
        seconds()
    runs = [seconds() for _ in range(int(options.get("runs", 20)))]
    tell("copied_bytes", count)
    tell("seconds", runs)
    # The fastest: what the memory can do, undisturbed.
    tell("bandwidth_bytes_s", 2 * count / min(runs))


def decode(tell: Tell, options: Options) -> None:
    """Decode speed at batch 1, its bytes a token, and TTFT with few and many crops."""
    from molmo_edge import EdgeVLM
    from molmo_edge.bench.ceilings import shape_of

    tokens, runs = int(options["tokens"]), int(options["runs"])
    with EdgeVLM(**options["engine"]) as vlm:
        tell("environment", dict(vlm.environment))
        tell("startup_s", dict(vlm.startup))
        tell("kv_cache_tensors", kv_cache_tensors(vlm))
        _ask(vlm, None, 16, seed=0)
        speeds = []
        for seed in range(runs + 2):
            metrics = _ask(vlm, TWO_CROPS, tokens, seed=seed, max_crops=1).metrics
            speeds.append(metrics.output_tps)
            tell("decode_tps", speeds[2:])
        context = metrics.prompt_tokens + tokens // 2
        shape = shape_of(vlm)
        environment = vlm.environment
        kv = environment["kv_cache_dtype"]
        width = 2 if environment["dtype"] == "float32" else 1
        step = None
        if shape is not None and environment["precision"] in ("bf16", "fp32", "fp8"):
            precision = "fp8" if environment["precision"] == "fp8" else "bf16"
            step = width * shape.decode_bytes(precision)
            step += shape.kv_bytes(context, "bfloat16" if kv == "auto" else kv)
        tell("bytes_per_token", step)
        for name, size, crops in (("2", TWO_CROPS, 1), ("13", THIRTEEN_CROPS, 12)):
            found = []
            for seed in range(runs + 1):
                found.append(_ask(vlm, size, 1, seed=1000 + seed, max_crops=crops).metrics)
            tell(
                f"ttft_{name}_crops",
                {
                    "ttft_s": [m.ttft_s for m in found[1:]],
                    "preprocess_s": [m.preprocess_s for m in found[1:]],
                    "prompt_tokens": found[0].prompt_tokens,
                },
            )


def kv_cache_tensors(vlm: Any) -> dict[str, Any] | None:
    """dtype and number of the KV cache's tensors as they lie in the engine; None if not found."""

    def look(engine: Any) -> dict[str, Any] | None:
        core = engine.llm.llm_engine.engine_core.engine_core
        worker = core.model_executor.driver_worker
        runner = getattr(worker, "worker", worker).model_runner
        caches = getattr(runner, "kv_caches", None)
        if not caches:
            return None
        return {"dtypes": sorted({str(one.dtype) for one in caches}), "count": len(caches)}

    try:
        found: dict[str, Any] | None = vlm.in_engine_thread(look)
    except AttributeError:
        return None
    return found


def overhead(tell: Tell, options: Options) -> None:
    """`EdgeVLM` against bare `vllm.LLM`; see `overhead.py`."""
    from overhead import run

    document = run(options["engine"], **options["run"])
    tell("against", document["against"])
    tell("rounds", document["rounds"])


def concurrency(tell: Tell, options: Options) -> None:
    """Requests together, each with a new picture: tokens a second in all and for each user."""
    from molmo_edge import EdgeVLM, Request

    tokens = int(options["tokens"])
    with EdgeVLM(**options["engine"]) as vlm:
        tell("environment", dict(vlm.environment))
        rows = []
        seed = 0
        for users in options["users"]:
            waves = []
            for _ in range(int(options["runs"]) + 1):
                requests = []
                for _ in range(users):
                    seed += 1
                    image = picture(seed, TWO_CROPS)
                    requests.append(
                        Request(image, QUESTION, max_tokens=tokens, ignore_eos=True, max_crops=1)
                    )
                began = time.perf_counter()
                found = [one.metrics for one in vlm.batch(requests)]
                waves.append((time.perf_counter() - began, found))
            later = waves[1:]
            rows.append(
                {
                    "users": users,
                    "total_tps": statistics.median(users * tokens / wall for wall, _ in later),
                    "user_tps": _median([m.output_tps for _, f in later for m in f]),
                    "ttft_s": _median([m.ttft_s for _, f in later for m in f]),
                    "wall_s": [wall for wall, _ in later],
                }
            )
            tell("rows", rows)


def warm(tell: Tell, options: Options) -> None:
    """The first start against the next one with the cache folder kept; see `startup.py`."""
    from startup import compare

    found = compare(
        options["model"],
        eager=bool(options["eager"]),
        repeats=int(options["repeats"]),
        options=options["engine"],
    )
    for name, value in found.items():
        tell(name, value)


def telemetry(tell: Tell, options: Options) -> None:
    """The sampler's power and energy against the driver's own counter, idle and under load."""
    from molmo_edge import EdgeVLM
    from molmo_edge.devices.nvml import Nvml
    from molmo_edge.devices.sources import system_sources
    from molmo_edge.devices.telemetry import Sampler

    with Nvml(system_sources()) as nvml, EdgeVLM(**options["engine"]) as vlm:

        def counter_j() -> float | None:
            millijoules = nvml.number("nvmlDeviceGetTotalEnergyConsumption")
            return None if millijoules is None else millijoules / 1000.0

        _ask(vlm, TWO_CROPS, 16, seed=0, max_crops=1)
        for name in ("idle", "load"):
            before, began, seed, tokens = counter_j(), time.monotonic(), 1, 0
            with Sampler(0.1) as sampler:
                while time.monotonic() - began < options["seconds"]:
                    if name == "idle":
                        time.sleep(0.2)
                    else:
                        seed += 1
                        answer = _ask(vlm, TWO_CROPS, 64, seed=seed, max_crops=1)
                        tokens += answer.metrics.output_tokens
                after = counter_j()
            summary = sampler.summary()
            watts = summary.power_w
            spent = None if before is None or after is None else after - before
            integrated = None if watts is None else watts.mean * summary.duration_s
            tell(
                name,
                {
                    **summary.as_dict(),
                    "counter_j": spent,
                    "integrated_j": integrated,
                    "integrated_over_counter": integrated / spent if integrated and spent else None,
                    "output_tokens": tokens,
                    "joules_per_token": spent / tokens if spent and tokens else None,
                },
            )


def soak(tell: Tell, options: Options) -> None:
    """Minutes of mixed load with cancels: every request ends, and memory stays where it was."""
    import psutil

    from molmo_edge import EdgeVLM, Request
    from molmo_edge.errors import RequestCancelled

    dice = random.Random(0)
    ended = {"answered": 0, "cancelled": 0, "batched": 0}
    marks: list[dict[str, Any]] = []
    process = psutil.Process()
    with EdgeVLM(**options["engine"]) as vlm:
        began = time.monotonic()
        seed = 0
        while (now := time.monotonic() - began) < options["seconds"]:
            seed += 1
            size = dice.choice((TWO_CROPS, THIRTEEN_CROPS)) if options["large"] else TWO_CROPS
            tokens = dice.randrange(1, int(options["tokens"]))
            kind = dice.random()
            if kind < 0.3:
                stream = vlm.stream(picture(seed, size), QUESTION, max_tokens=512, ignore_eos=True)
                next(stream)
                stream.cancel()
                try:
                    stream.result()
                except RequestCancelled:
                    ended["cancelled"] += 1
            elif kind < 0.5:
                requests = [
                    Request(picture(seed, TWO_CROPS), f"{QUESTION} {i}", max_tokens=tokens)
                    for i in range(4)
                ]
                ended["batched"] += len(vlm.batch(requests))
            else:
                vlm.query(picture(seed, size), QUESTION, max_tokens=tokens, ignore_eos=True)
                ended["answered"] += 1
            if not marks or now - marks[-1]["at_s"] >= options["seconds"] / 24:
                gc.collect()
                marks.append(
                    {
                        "at_s": now,
                        "rss_bytes": process.memory_info().rss,
                        "device_bytes": _device_bytes(),
                        "threads": process.num_threads(),
                    }
                )
                tell("marks", marks)
                tell("ended", ended)
        in_flight = vlm.in_engine_thread(
            lambda engine: engine.llm.llm_engine.get_num_unfinished_requests()
        )
        tell("left_in_engine", in_flight)
    tell("growth", {name: growth(marks, name) for name in ("rss_bytes", "device_bytes")})


def growth(marks: list[dict[str, Any]], name: str) -> float | None:
    """Median of the last quarter over that of the second, minus 1: the first one still warms up."""
    values = [mark[name] for mark in marks if mark[name] is not None]
    quarter = len(values) // 4
    if quarter < 1:
        return None
    early = statistics.median(values[quarter : 2 * quarter])
    return statistics.median(values[-quarter:]) / early - 1 if early else None


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _device_bytes() -> int | None:
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def _ask(
    vlm: Any, size: tuple[int, int] | None, tokens: int, *, seed: int, max_crops: int | None = None
) -> Any:
    image = None if size is None else picture(seed, size)
    return vlm.query(image, QUESTION, max_tokens=tokens, ignore_eos=True, max_crops=max_crops)


STAGES: Mapping[str, Callable[[Tell, Options], None]] = {
    "verify": verify,
    "copy": copy,
    "decode": decode,
    "overhead": overhead,
    "concurrency": concurrency,
    "warm": warm,
    "telemetry": telemetry,
    "soak": soak,
}


def run_case(stage: str, options: Options, parts: Path) -> None:
    """Runs one case in this process, adding what it tells to `parts` as lines of JSON."""
    import json

    with parts.open("a", encoding="utf-8") as file:

        def tell(name: str, value: Any) -> None:
            file.write(json.dumps({name: value}, default=str) + "\n")
            file.flush()

        STAGES[stage](tell, options)
