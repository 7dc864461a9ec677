"""Proof on one GPU: right answers by backend, speed against bandwidth, overhead, cold starts.

    python benchmarks/gpu_check.py --output gpu.json                     # at most 15 minutes
    python benchmarks/gpu_check.py --output gpu.json --stages decode
    python benchmarks/gpu_check.py --device cpu --output cpu.json        # the same code, small

One JSON document, made of cases. Each case runs in a process of its own and keeps what it measured
when it fails or its time is up; started again on the same file, the script runs what is missing. A
combination that this machine cannot run is recorded as "unusable" with vLLM's reason, and is no
failure.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import harness

from molmo_edge.bench import scenarios
from molmo_edge.bench.cases import standard
from molmo_edge.bench.document import Document
from molmo_edge.bench.environment import Target
from molmo_edge.bench.measure import Bench, RunOptions
from molmo_edge.bench.tables import UNKNOWN, number, percent, table
from molmo_edge.errors import BenchmarkError

KIND = "gpu-check"
SEVEN_B = {"model": "allenai/Molmo-7B-D-0924", "load_format": "dummy", "max_model_len": 4096}
FOUR_B = {"model": "allenai/Molmo2-4B", "load_format": "dummy", "max_model_len": 8192}
LIMITS_S = {
    "verify": 240.0,
    "decode": 200.0,
    "overhead": 100.0,
    "start": 170.0,
    "speculation": 190.0,
}
"""Stages and their seconds, 15 minutes together; what does not fit is left for the next run.
`--seconds` stretches or shrinks those of the chosen stages."""

DONE = ("ok", "unusable")
"""Cases that are not run again."""

# Language and vision attention that vLLM's CUDA platform has for models of this kind. Those that
# cannot do a dtype, or are not installed, fail at the start and are recorded as unusable.
LANGUAGE = ("TRITON_ATTN", "FLASH_ATTN", "FLASHINFER")
VISION = ("TORCH_SDPA", "TRITON_ATTN", "FLASH_ATTN")


@dataclass(frozen=True)
class Case:
    """One measurement: a name within its stage, and the options of its function."""

    stage: str
    name: str
    options: Mapping[str, Any]

    @property
    def function(self) -> str:
        return "copy" if self.name == "copy" else self.stage


def verify_case(
    name: str, language: str | None = None, vision: str | None = None, **options: Any
) -> Case:
    """A verdict of `reference.verify` with these backends, None leaving them to vLLM."""
    backends = {"attention_backend": language, "mm_encoder_attn_backend": vision}
    # A part of the memory, so that cases can share the card.
    room = {"gpu_memory_utilization": 0.2, "kv_cache_memory_gb": 0.5}
    args = {**room, **{k: v for k, v in backends.items() if v}, **options.pop("engine_args", {})}
    return Case("verify", name, {**options, "engine_args": args})


def cuda_cases() -> Iterator[Case]:
    """What a GPU has to show; the most telling of each stage first."""
    exact = ("TRITON_ATTN", "TORCH_SDPA")
    molmo2: dict[str, Any] = {"family": "molmo2"}
    yield verify_case("Molmo 2, float32", *exact, dtype="float32", stock=True, **molmo2)
    fp8_kv = {"dtype": "bfloat16", "kv_cache_dtype": "fp8"}
    yield verify_case("Molmo 2, bfloat16 kv fp8", **fp8_kv, **molmo2)
    for vision in VISION:
        name = f"Molmo 2, vision {vision}"
        yield verify_case(name, None, vision, dtype="bfloat16", **molmo2)
    yield verify_case("Molmo 2, float32 o-7b", *exact, dtype="float32", layout="o-7b", **molmo2)
    # FlashInfer first: it compiles its kernels at first use.
    pairs = [(language, VISION[0]) for language in LANGUAGE]
    pairs += [(LANGUAGE[0], vision) for vision in VISION[1:]]
    for language, vision in sorted(pairs, key=lambda pair: "FLASHINFER" not in pair):
        yield verify_case(f"{language}, vision {vision}", language, vision, dtype="bfloat16")
    yield verify_case("float32", *exact, dtype="float32", stock=True)
    for kv in ("fp8", "fp8_per_token_head"):
        yield verify_case(f"bfloat16 kv {kv}", dtype="bfloat16", kv_cache_dtype=kv)
    fp8 = {"precision": "fp8"}
    yield verify_case("bfloat16 weights fp8", dtype="bfloat16", engine_args=fp8)
    yield verify_case("float32 7b-o", *exact, dtype="float32", layout="7b-o")
    yield Case("decode", "copy", {"device": "cuda", "bytes": 4 << 30})
    kv_dtypes = ("auto", "fp8", "fp8_per_token_head")
    # A part of the memory: several engines start at once.
    room = {"max_num_seqs": 8, "gpu_memory_utilization": 0.25, "kv_cache_memory_gb": 2.0}
    for kv, precision in product(kv_dtypes, ("bf16", "fp8")):
        engine = {**SEVEN_B, "precision": precision, "kv_cache_dtype": kv, **room}
        yield Case("decode", f"{precision} kv {kv}", {"engine": engine, "tokens": 256, "runs": 3})
        if kv == "auto":
            engine = {**engine, **FOUR_B}
            more = {"crops": (1, 8), "frames": 64, "tokens": 256, "runs": 3}
            yield Case("decode", f"Molmo2-4B {precision} kv {kv}", {"engine": engine, **more})
    plan = {"starts": 1, "pairs": 8, "tokens": 257, "limit_s": 30}
    for name, engine in (("7b", {**SEVEN_B, **room}), ("stub", {"model": "stub", **room})):
        yield Case("overhead", name, {"engine": engine, **plan})
    yield Case("start", "7b", {"engine": SEVEN_B, "starts": 1})
    yield Case("speculation", "small models", {"starts": 1, "threads": 0})


def cpu_cases() -> Iterator[Case]:
    """The same code on the stub, as a test of this script."""
    yield verify_case("Molmo 2, float32", dtype="float32", small=True, family="molmo2")
    yield verify_case("float32", dtype="float32", stock=True, small=True)
    yield verify_case("bfloat16 kv fp8", dtype="bfloat16", kv_cache_dtype="fp8", small=True)
    yield Case("decode", "copy", {"device": "cpu", "bytes": 1 << 28})
    # Processors without bfloat16 instructions take minutes for an image in it.
    stub = {"model": "stub", "max_model_len": 2048, "max_num_seqs": 4, "enforce_eager": True,
            "dtype": "float32", "max_crops": 1, "kv_cache_memory_gb": 0.25}  # fmt: skip
    small = {"engine": stub, "tokens": 17, "runs": 3, "crops": [1]}
    yield Case("decode", "float32 kv auto", small)
    plan = {"starts": 1, "pairs": 3, "tokens": 65, "limit_s": 60, "threads": 1}
    yield Case("overhead", "stub", {"engine": stub, **plan})
    yield Case("start", "stub", {"engine": stub, "starts": 1})
    yield Case("speculation", "small models", {"starts": 1, "threads": 1})


def with_backends(case: Case, language: str | None, vision: str | None) -> Case:
    """The case with these backends wherever it leaves them to vLLM."""
    key = "engine_args" if case.function == "verify" else "engine"
    backends = {"attention_backend": language, "mm_encoder_attn_backend": vision}
    backends = {name: value for name, value in backends.items() if value is not None}
    if key not in case.options:
        return case
    return replace(case, options={**case.options, key: {**backends, **case.options[key]}})


# Measurements, each in a process of its own.


def verify(emit: harness.Emit, options: Mapping[str, Any]) -> None:
    from molmo_edge.reference import verify as verification

    arguments = dict(options)
    requests, tokens = verification.default_requests(arguments.get("family", "molmo")), 12
    if arguments.pop("small", False):
        kept = requests.keys() & {"small", "3 images", "video", "text only"}
        requests, tokens = {name: requests[name] for name in requests if name in kept}, 4
    for report in verification.verify(requests=requests, max_tokens=tokens, **arguments):
        emit(
            "stock" if report.stock else "ours",
            {
                "ok": report.ok,
                "bound": report.bound,
                "max_dlogprob": max((case.max_dlogprob or 0.0) for case in report.cases),
                "cases": [vars(case) for case in report.cases],
            },
        )


def copy(emit: harness.Emit, options: Mapping[str, Any]) -> None:
    """Bytes per second that a large copy within the device's memory reads and writes together."""
    import torch

    source = torch.ones(options["bytes"], dtype=torch.uint8, device=options["device"])
    target = torch.empty_like(source)
    seconds = []
    for _ in range(23):
        began = time.perf_counter()
        target.copy_(source)
        if options["device"] == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    # The fastest: what the memory can do, undisturbed.
    emit("bandwidth_bytes_s", 2 * options["bytes"] / min(seconds))


def decode(emit: harness.Emit, options: Mapping[str, Any]) -> None:
    """Decode speed at batch 1, bytes per token, power; TTFT with few and all crops, and video."""
    case, runs = standard()[0], options["runs"]
    cases = tuple(
        replace(case, name=f"{crops + 1} crops", title=f"{crops + 1} crops", max_crops=crops)
        for crops in options.get("crops", (1, 12))
    )
    plan = RunOptions(
        iterations=runs,
        max_iterations=runs,
        max_tokens=options["tokens"],
        ignore_eos=True,
        frames=(options.get("frames", 0),),
    )
    names = ["report", *(["video"] if "frames" in options else [])]

    def save(document: Document) -> None:
        emit("environment", document.environment.model_dump())
        rows = [row for scenario in document.scenarios for row in scenario.rows]
        for row in (row for row in rows if row.all):
            emit(
                row.name,
                {
                    "decode_tps": row.summary("output_tps").model_dump(),
                    "ttft_s": row.summary("ttft_s").model_dump(),
                    "ceiling": row.ceiling.model_dump() if row.ceiling else {},
                    "error": row.error,
                },
            )

    target = Target(options=options["engine"])
    # Engines start side by side. The shared lock ends with the start; the exclusive one, got when
    # no other engine starts or is measured, with the process.
    with Path(__file__).open() as turn:
        fcntl.flock(turn, fcntl.LOCK_SH)

        def open_and_wait(caches: bool) -> Any:
            vlm = target.open(caches)
            fcntl.flock(turn, fcntl.LOCK_EX)
            return vlm

        scenarios.run(Bench(cases, plan, save=save, sensors=True), open_and_wait, names)


def overhead(emit: harness.Emit, options: Mapping[str, Any]) -> None:
    """`EdgeVLM` against bare `vllm.LLM`; see `overhead.py`."""
    from overhead import run

    arguments = dict(options)
    document = run(arguments.pop("engine"), **arguments)
    emit("result", document["result"])


def start(emit: harness.Emit, options: Mapping[str, Any]) -> None:
    """Process start to first token: disk caches absent, then present."""
    target = Target(options=options["engine"])
    bench = Bench(
        standard()[:1],
        RunOptions(max_tokens=8, ignore_eos=True, starts=options["starts"]),
        start_command=target.start_command(),
    )
    document = scenarios.run(bench, target.open, ["cold-start"])
    for row in document.scenarios[0].rows:
        walls = [sample.wall_s for sample in row.succeeded if sample.wall_s is not None]
        errors = [sample.error for sample in row.samples if sample.error]
        values = {"wall_s": walls, "stages": row.counts, "errors": errors}
        emit("present" if row.conditions["disk_caches"] else "absent", values)
        if errors:
            raise BenchmarkError(errors[0])


def speculation(emit: harness.Emit, options: Mapping[str, Any]) -> None:
    """Drafted tokens against none; see `speculation.py`."""
    from speculation import run

    document = run(**options)
    emit("async_scheduling", document["async_scheduling"])
    emit("result", document["result"])


MEASUREMENTS = {one.__name__: one for one in (verify, copy, decode, overhead, start, speculation)}


def begin(output: Path) -> dict[str, Any]:
    """The document to continue: the file's, if it is of this machine and software, or a new one."""
    fresh = harness.result(KIND, stages={})
    if not output.exists():
        return fresh
    try:
        document: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
        then, now = (
            (one["format"], one["software"], one["device"]["name"], one["device"]["driver"])
            for one in (document, fresh)
        )
        if then == now:
            return document
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise BenchmarkError(
        f"{output} is no result of this script, or was measured with other software or on another "
        "device; choose another file"
    )


def run(
    cases: Sequence[Case],
    output: Path,
    *,
    limits_s: Mapping[str, float] = LIMITS_S,
    threads: int = 0,
    jobs: int = 1,
) -> dict[str, Any]:
    """Run the cases that the file lacks, writing it after each; returns the document.

    `jobs` cases of `verify`, which times nothing, run at once, and half as many of `decode`, whose
    engines start side by side and are measured one after another.
    """
    document, lock = begin(output), threading.Lock()

    def measure(case: Case, results: dict[str, Any], ends: float, threads: int) -> None:
        left = ends - time.monotonic()
        if left < 1:
            skipped = {"status": "not run", "error": "no time left", "values": {}}
            results.setdefault(case.name, skipped)
            return
        child = harness.run_child(
            __file__, case.function, case.options, limit_s=left, threads=threads
        )
        with lock:
            results[case.name] = {"options": dict(case.options), **child}
            harness.progress(
                f"{case.stage}: {case.name}: {child['status']}, {child['seconds']:.0f} s"
            )
            harness.write(document, output)

    for stage in dict.fromkeys(case.stage for case in cases):
        ends = time.monotonic() + limits_s[stage]
        results = document["stages"].setdefault(stage, {})
        missing = [
            case
            for case in cases
            if case.stage == stage and results.get(case.name, {}).get("status") not in DONE
        ]
        side_by_side = {"verify": jobs, "decode": max(1, jobs // 2)}.get(stage, 1)
        share = -(-(os.cpu_count() or 1) // side_by_side) if side_by_side > 1 else threads
        with ThreadPoolExecutor(side_by_side) as pool:
            pending = [pool.submit(measure, case, results, ends, share) for case in missing]
        for each in pending:
            each.result()
    harness.write(document, output)
    return document


# Tables.


def markdown(document: Mapping[str, Any]) -> str:
    device, software = document["device"], document["software"]
    head = [
        f"{device['name']}, driver {device['driver'] or UNKNOWN}, CUDA {device['cuda'] or UNKNOWN}"
    ]
    head += [f"{name} {version}" for name, version in software.items() if version]
    parts = ["; ".join(head)]
    for stage, (heads, rows_of) in TABLES.items():
        results = document["stages"].get(stage, {})
        values = {name: one["values"] for name, one in results.items()}
        rows = [[*row, ""] for row in rows_of(values)]
        for name, one in results.items():
            if one["status"] != "ok":
                reason = " ".join((one["error"] or UNKNOWN).split())[-160:]
                rows.append([name, *[UNKNOWN] * (len(heads) - 1), f"{one['status']}: {reason}"])
        if rows:
            parts.append(f"### {stage}\n\n{table([*heads, 'problem'], rows)}")
    return "\n\n".join(parts)


Values = Mapping[str, Mapping[str, Any]]


def verify_rows(values: Values) -> Iterator[list[str]]:
    for name, one in values.items():
        for model, report in one.items():
            verdict = "right" if report["ok"] else "WRONG"
            yield [name, model, verdict, f"{report['max_dlogprob']:.2g}", f"{report['bound']:g}"]


def decode_rows(values: Values) -> Iterator[list[str]]:
    copied = values.get("copy", {}).get("bandwidth_bytes_s")
    if copied:
        yield ["copy", UNKNOWN, UNKNOWN, f"{copied / 1e9:.0f} GB/s", *[UNKNOWN] * 4]
    for name, one in values.items():
        if "2 crops" in one:
            few, many = one["2 crops"], one.get("13 crops") or one.get("9 crops", {})
            speed, step = few["decode_tps"]["mean"], few["ceiling"].get("bytes_per_token")
            fraction = speed * step / copied if speed and step and copied else None
            yield [
                name,
                number(speed, 1),
                number(step and step / 1e9, 2),
                percent(fraction),
                number(few["ttft_s"]["median"], 3),
                number(many.get("ttft_s", {}).get("median"), 3),
                number(one.get("video-64", {}).get("ttft_s", {}).get("median"), 3),
                number(few["ceiling"].get("joules_per_token"), 2),
            ]


def overhead_rows(values: Values) -> Iterator[list[str]]:
    for name, one in values.items():
        if (figures := one.get("result")) is None:
            continue
        for metric, digits in (("decode_tps", 3), ("ttft_s", 3), ("cost_us", 1)):
            pair = figures[metric]
            texts = [harness.interval_text(each, digits) for each in (pair, pair["floor"])]
            yield [name, metric, *texts]


def start_rows(values: Values) -> Iterable[list[str]]:
    for name, one in values.items():
        if "present" not in one:
            continue
        absent, present = (statistics.median(one[key]["wall_s"]) for key in ("absent", "present"))
        yield [name, number(absent, 1), number(present, 1)]


def speculation_rows(values: Values) -> Iterator[list[str]]:
    for one in values.values():
        for kind, sides in one.get("result", {}).items():
            for side in ("ngram", "format"):
                speeds = (sides[side]["decode_tps"], sides["again"]["decode_tps"])
                texts = [harness.interval_text(speed) for speed in speeds]
                yield [kind, side, number(sides[side]["tokens_per_step"], 2), *texts]


TABLES = {
    "verify": (["case", "model", "verdict", "max abs dlogprob", "bound"], verify_rows),
    "decode": (["weights, KV", "tok/s", "GB per token", "fraction of the copy's bandwidth",
                "TTFT, 2 crops (s)", "all crops (s)", "64 frames (s)", "J/token"], decode_rows),
    "overhead": (["model", "metric", "ours against bare", "bare against itself"], overhead_rows),
    "start": (["model", "disk caches absent (s)", "present (s)"], start_rows),
    "speculation": (["answers", "speculation", "tokens per step", "decode of off's", "floor"],
                    speculation_rows),
}  # fmt: skip


def main() -> None:
    harness.serve_child(MEASUREMENTS)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("gpu-check.json"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--stages", default=",".join(LIMITS_S), help="of " + ", ".join(LIMITS_S))
    parser.add_argument("--attention", help="language backend of cases that name none")
    parser.add_argument("--vision", help="vision backend of cases that name none")
    parser.add_argument("--seconds", type=float, help="for all chosen stages together")
    parser.add_argument("--jobs", type=int, default=1, help="engines at once")
    arguments = parser.parse_args()
    stages = [name.strip() for name in arguments.stages.split(",")]
    if unknown := sorted(set(stages) - set(LIMITS_S)):
        raise BenchmarkError(f"unknown stage {unknown[0]}; choose from {', '.join(LIMITS_S)}")
    cases = [
        with_backends(case, arguments.attention, arguments.vision)
        for case in (cuda_cases() if arguments.device == "cuda" else cpu_cases())
        if case.stage in stages
    ]
    usual = sum(LIMITS_S[stage] for stage in stages)
    scale = (arguments.seconds or usual) / usual
    document = run(
        cases,
        arguments.output,
        limits_s={stage: scale * LIMITS_S[stage] for stage in stages},
        threads=int(arguments.device == "cpu"),
        jobs=arguments.jobs,
    )
    print(markdown(document))
    statuses = [one["status"] for stage in document["stages"].values() for one in stage.values()]
    sys.exit(0 if all(status in DONE for status in statuses) else 1)


if __name__ == "__main__":
    harness.start(main)
