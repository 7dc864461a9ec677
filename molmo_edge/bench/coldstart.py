"""Process start to first token, in fresh subprocesses: caches on disk absent, then present.

Each start runs ``python -m molmo_edge.bench.coldstart`` with the request as JSON on standard input;
the child prints one JSON line. The compile caches are in a directory of this run's own, empty at
the first start and kept for the next, so that the result does not depend on earlier runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from molmo_edge.bench import cases
from molmo_edge.bench.document import Row, Sample
from molmo_edge.bench.measure import Bench, sample_of
from molmo_edge.devices.caches import CACHE_VARIABLES
from molmo_edge.files import scratch

LIMIT_S = 1800.0
"""A start that takes longer is reported as failed."""


def measure(bench: Bench) -> None:
    """Two rows: the first start ever, and the starts after it."""
    with scratch(Path(tempfile.gettempdir())) as directory:
        for present in (False, True):
            title = f"disk caches {'present' if present else 'absent'}"
            with bench.row(bench.cases[0], caches=None, title=title, disk_caches=present) as row:
                for iteration in range(bench.options.starts if present else 1):
                    bench.add(row, start_once(bench, row, iteration, directory))
                row.stopped = "fixed"


def start_once(bench: Bench, row: Row, iteration: int, directory: Path) -> Sample:
    """One fresh process: its sample, ``wall_s`` being process start to first token."""
    case = bench.cases[0]
    request = {"text": case.question, **bench.sampling(case)}
    start = time.time()
    try:
        process = subprocess.run(
            bench.start_command,
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            env={**os.environ, **{name: str(directory / name) for name in CACHE_VARIABLES}},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Sample(iteration=iteration, error=f"no first token within {LIMIT_S:.0f} s")
    lines = [line for line in process.stdout.splitlines() if '"first_token_at"' in line]
    if process.returncode != 0 or not lines:
        last = (process.stderr.strip().splitlines() or ["no message"])[-1]
        return Sample(iteration=iteration, error=f"exit status {process.returncode}: {last}")
    report = json.loads(lines[-1])
    row.counts |= {f"{stage}_s": seconds for stage, seconds in report["stages"].items()}
    row.counts["interpreter_s"] = report["running_at"] - start
    wall_s = report["first_token_at"] - start
    return Sample.model_validate({**report["sample"], "iteration": iteration, "wall_s": wall_s})


def child(start_json: str) -> None:
    """In the fresh process: build, send one request, print one line. Times are wall clock, so that
    the parent can subtract."""
    running_at = time.time()
    from molmo_edge import EdgeVLM

    start, request = json.loads(start_json), json.loads(sys.stdin.read())
    image = (cases.own([Path(start["image"])]) if start["image"] else cases.standard())[0].image
    with EdgeVLM(**start["engine"]) as vlm:
        sent_at = time.time()
        sample = sample_of(vlm.query(image, **request), 0)
        report = {
            "running_at": running_at,
            "first_token_at": sent_at + (sample.ttft_s or 0.0),
            "stages": dict(vlm.startup),
            "sample": sample.model_dump(mode="json"),
        }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    child(sys.argv[1])
