"""Process start to first token, in fresh subprocesses: caches on disk absent, then present.

Each start runs ``python -m molmo_edge.bench.coldstart`` with its request as JSON on standard
input; the child prints one JSON line. The compile caches of vLLM, Triton, FlashInfer, inductor
and CUDA are pointed at a folder of this run's own, empty at the first start and kept for the
next, so that "absent" and "present" do not depend on what the machine did before.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from molmo_edge.bench import cases as case_set
from molmo_edge.bench.cases import Case
from molmo_edge.bench.document import Row, Sample
from molmo_edge.bench.scenarios import Bench
from molmo_edge.errors import BenchmarkError

CACHES = {
    "VLLM_CACHE_ROOT": "vllm",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "CUDA_CACHE_PATH": "cuda",
}
"""Environment variables of the caches that survive a process, and their folders here."""

LIMIT_S = 1800.0
"""A start that takes longer than half an hour is reported as failed."""


def cold_start(bench: Bench) -> None:
    """Two rows: the first start ever, and the starts after it."""
    if not bench.start_command:
        raise BenchmarkError("cold starts need the model's settings; run them from the command")
    case = bench.cases[0]
    with tempfile.TemporaryDirectory(prefix="molmo-edge-cold-") as folder:
        for present in (False, True):
            title = f"disk caches {'present' if present else 'absent'}"
            with bench.recorder.row(case, caches=None, title=title, disk_caches=present) as row:
                for iteration in range(bench.load.starts if present else 1):
                    bench.recorder.add(row, start_once(bench, row, iteration, Path(folder)))
                row.stopped = "fixed"


def start_once(bench: Bench, row: Row, iteration: int, folder: Path) -> Sample:
    """One fresh process: its sample, ``wall_s`` being process start to first token."""
    environment = dict(os.environ)
    environment.update({name: str(folder / place) for name, place in CACHES.items()})
    wanted = {"max_tokens": bench.plan.max_tokens, "ignore_eos": bench.plan.ignore_eos}
    start = time.time()
    try:
        done = subprocess.run(
            bench.start_command,
            input=json.dumps(wanted),
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Sample(iteration=iteration, error=f"no first token within {LIMIT_S:.0f} s")
    except OSError as exc:
        raise BenchmarkError(f"cannot start a fresh process: {exc.strerror}") from exc
    report = _last_line(done.stdout)
    if done.returncode != 0 or report is None:
        words = done.stderr.strip().splitlines()
        last = words[-1] if words else "no message"
        return Sample(iteration=iteration, error=f"exit status {done.returncode}: {last}")
    sample = Sample.model_validate({**report["sample"], "iteration": iteration})
    if report["first_token_at"] is not None:
        sample.wall_s = report["first_token_at"] - start
    for stage, seconds in report["stages"].items():
        row.counts[f"{stage}_s"] = seconds
    row.counts["interpreter_s"] = report["running_at"] - start
    return sample


def _last_line(text: str) -> dict[str, Any] | None:
    for line in reversed(text.strip().splitlines()):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and "first_token_at" in value:
            return value
    return None


def child(arguments: list[str]) -> None:
    """What the fresh process does: build, ask once, print one line. Wall clock, so that the
    parent can subtract."""
    running_at = time.time()
    from molmo_edge import EdgeVLM
    from molmo_edge.bench import measure

    settings = json.loads(arguments[0])
    wanted = json.loads(sys.stdin.read())
    case: Case = (
        case_set.own([Path(settings["image"])])[0]
        if settings.get("image")
        else case_set.standard()[0]
    )
    with EdgeVLM(settings.get("model"), **settings.get("options", {})) as vlm:
        asked_at = time.time()
        result = vlm.query(case.image, case.question, **wanted)
        sample = measure.sample_of(result, iteration=0)
        first = None if sample.ttft_s is None else asked_at + sample.ttft_s
        line = {
            "running_at": running_at,
            "first_token_at": first,
            "stages": dict(vlm.startup),
            "sample": sample.model_dump(mode="json"),
        }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    child(sys.argv[1:])
