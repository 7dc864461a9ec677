"""Process start to first token: the first start against the next ones, with and without compiling.

Every start is a fresh process. The first has an empty cache root, the next ones what it left there:
code compiled by torch, Triton, FlashInfer and the CUDA driver. The checkpoint is not part of that:
the stub is written beforehand, and its files are in the page cache for all of them. With
`--cold-weights` they are dropped from it before each start, as behind a reboot.

    python benchmarks/startup.py --repeats 3 --out benchmarks/results/startup.json
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from molmo_edge.checkpoint_files import weight_files
from molmo_edge.devices.caches import CACHE_VARIABLES
from molmo_edge.errors import BenchmarkError
from molmo_edge.models.hub import default_cache_dir, locate
from molmo_edge.models.molmo.stub import NAME as STUB

PARTS = ("weights", "compile", "profile", "warmup")
"""Of `vllm.LLM`, as `EdgeVLM.startup` has them; unknown where vLLM does not show them."""

STAGES = ("interpreter", "imports", "config", *PARTS, "rest", "first_token")
"""Python itself; molmo_edge, torch and vLLM; settings, device and checkpoint; `vllm.LLM` in parts
and what is left of it; the answer's first token, picture preprocessing included. Together they are
the whole time."""

COLUMNS = (*STAGES, "total", "cpu")
"""Wall-clock seconds, and processor seconds of the whole process, its end included."""

LIMIT_S = 1800.0


def child(settings: dict[str, Any]) -> None:
    """One start: prints its stages as a line of JSON. Wall clock, which the parent shares."""
    running = time.time()
    from molmo_edge import EdgeVLM
    from molmo_edge.bench.cases import standard

    case = standard()[0]
    imported = time.time()
    with EdgeVLM(**settings) as vlm:
        up = time.time()
        metrics = vlm.query(case.image, case.question, max_tokens=8, ignore_eos=True).metrics
        began = vlm.startup
        known = {name: began[name] for name in PARTS}
        report = {
            "running_at": running,
            "first_token_at": up + (metrics.ttft_s or 0.0),
            "imports_s": imported - running + began["imports"],
            # With the little that comes behind the engine.
            "config_s": up - imported - began["imports"] - began["engine"],
            **{f"{name}_s": seconds for name, seconds in known.items()},
            "rest_s": began["engine"] - sum(seconds or 0.0 for seconds in known.values()),
            "first_token_s": metrics.ttft_s,
            "environment": dict(vlm.environment),
        }
    print(json.dumps(report), flush=True)


def start(settings: dict[str, Any]) -> dict[str, Any]:
    """Runs one fresh process. Returns seconds by stage, and its environment."""
    # The user's own cache folders would keep what a first start must not find.
    environ = {name: text for name, text in os.environ.items() if name not in CACHE_VARIABLES}
    command = [sys.executable, __file__, "--child", json.dumps(settings)]
    load, used = os.getloadavg()[0], _cpu_seconds()
    began = time.time()
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=LIMIT_S)
    if done.returncode != 0:
        raise BenchmarkError(f"a start failed:\n{done.stderr[-2000:]}")
    report: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    seconds = {
        "interpreter": report["running_at"] - began,
        **{stage: report[f"{stage}_s"] for stage in STAGES[1:]},
        "total": report["first_token_at"] - began,
    }
    # What the processors did in the process's whole life: other programs change it far less.
    seconds["cpu"] = _cpu_seconds() - used
    return {"seconds": {**seconds, "load": load}, "environment": report["environment"]}


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def compare(
    model: str,
    *,
    eager: bool,
    repeats: int,
    options: dict[str, Any] | None = None,
    cold_weights: bool = False,
) -> dict[str, Any]:
    """One first start and `repeats` with its caches: all of them, and the medians.

    `options` are further ones of `EdgeVLM`.
    """
    with tempfile.TemporaryDirectory(prefix="molmo-edge-startup-") as name:
        root = Path(name)
        if model == STUB:
            stub = locate(STUB, default_cache_dir())
            (root / stub.name).symlink_to(stub)
        settings = {**(options or {}), "model": model, "cache_dir": name, "enforce_eager": eager}
        starts = []
        for number in range(1 + repeats):
            if cold_weights:
                drop_weights(locate(model, root))
            starts.append(start(settings))
            total = starts[-1]["seconds"]["total"]
            kind = "caches kept" if number else "first start"
            print(f"{'eager' if eager else 'compiled'}, {kind}: {total:.1f} s", file=sys.stderr)
        kept = sum(path.stat().st_size for path in root.glob("compiled/**/*") if path.is_file())
    later = [one["seconds"] for one in starts[1:]]
    return {
        "mode": "eager" if eager else "torch.compile",
        "cold_weights": cold_weights,
        "first": starts[0]["seconds"],
        "caches_kept": later,
        "caches_kept_median": {name: middle([one[name] for one in later]) for name in COLUMNS},
        "cache_bytes": kept,
        "environment": starts[0]["environment"],
    }


def drop_weights(folder: Path) -> None:
    """Takes the weights out of the page cache, as far as no other process has them mapped."""
    for path in weight_files(folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def middle(values: list[float | None]) -> float | None:
    """The median, None where a value is unknown."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if len(known) == len(values) else None


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: seconds by stage."""
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for result in results:
        for kind, seconds in (
            ("first start", result["first"]),
            ("caches kept, median", result["caches_kept_median"]),
        ):
            told = ["?" if seconds[name] is None else f"{seconds[name]:.2f}" for name in COLUMNS]
            cells = " | ".join(told)
            lines.append(f"| {result['mode']}, {kind} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default=STUB, help="checkpoint folder, hub name, or stub")
    parser.add_argument("--repeats", type=int, default=3, help="starts with caches kept")
    parser.add_argument("--modes", nargs="+", choices=("eager", "compiled"),
                        default=["eager", "compiled"])  # fmt: skip
    parser.add_argument("--cold-weights", action="store_true",
                        help="drop the weights from the page cache before each start")  # fmt: skip
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(json.loads(options.child))
        return
    if options.repeats < 1:
        parser.error("--repeats must be 1 or more")
    load = os.getloadavg()[0]
    results = [
        compare(
            options.model,
            eager=mode == "eager",
            repeats=options.repeats,
            cold_weights=options.cold_weights,
        )
        for mode in options.modes
    ]
    print(table(results))
    if options.out is not None:
        document = {
            "command": " ".join(["python", "benchmarks/startup.py", *sys.argv[1:]]),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "cpu_count": os.cpu_count(),
            "load_before": load,
            "nice": os.nice(0),
            "stages": list(STAGES),
            "results": results,
        }
        options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
