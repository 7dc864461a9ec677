"""What busy Python code in the application costs the engine, in a thread and in a process.

    python benchmarks/contention.py --output benchmarks/results/contention-cpu.json

Each mode of `EdgeVLM(engine=…)` has an application process of its own; both are asked in turns,
one at a time. While a text answer is generated the application does nothing, counts in a Python
thread, multiplies NumPy matrices in a thread (which frees the interpreter's lock), or counts in
another process: the last costs the processor as much as the thread does, and the lock nothing. The
CPU engine is held to one thread, so that a core is left for the application.

Reported is decode speed against the idle application of the same round, and how often the busy
loop came round against having the machine to itself.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from _sides import threads_environment

from molmo_edge.bench.document import write_bytes
from molmo_edge.bench.environment import device_of, versions
from molmo_edge.engine.build import engine_device
from molmo_edge.errors import BenchmarkError, MolmoEdgeError

MODES = ("thread", "process")
LOADS = ("idle", "python thread", "numpy thread", "python process")
TEXT = "Write a short story about a robot in a garden."
_COUNTING = "while True:\n    for _ in range(1000):\n        pass\n"


class Load:
    """Keeps the application busy while it is open; `rounds` counts what it did."""

    def __init__(self, kind: str) -> None:
        self.rounds = 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._child: subprocess.Popen[bytes] | None = None
        if kind == "python process":
            self._child = subprocess.Popen([sys.executable, "-c", _COUNTING])
        elif kind != "idle":
            work = self._count if kind == "python thread" else self._multiply
            self._thread = threading.Thread(target=work)
            self._thread.start()

    def close(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._child is not None:
            self._child.kill()
            self._child.wait()

    def _count(self) -> None:
        while not self._ended.is_set():
            for _ in range(1000):
                pass
            self.rounds += 1

    def _multiply(self) -> None:
        import numpy as np

        a = np.ones((400, 400), np.float32)
        while not self._ended.is_set():
            a @ a
            self.rounds += 1


def application(mode: str, options: dict[str, Any]) -> None:
    """Serves one mode: a kind of load and a count of tokens in a line, what was measured out."""
    from molmo_edge import EdgeVLM

    with os.fdopen(os.dup(1), "w", buffering=1) as out:
        os.dup2(2, 1)  # what vLLM prints must not get between the lines
        with EdgeVLM(**options, engine=mode) as vlm:
            vlm.query(None, TEXT, max_tokens=16, ignore_eos=True)
            print(json.dumps({"environment": dict(vlm.environment)}), file=out, flush=True)
            for line in sys.stdin:
                asked = json.loads(line)
                load = Load(asked["load"])
                try:
                    time.sleep(0.2)
                    before, began = load.rounds, time.perf_counter()
                    if asked["tokens"]:
                        result = vlm.query(None, TEXT, max_tokens=asked["tokens"], ignore_eos=True)
                        tps = result.metrics.output_tps
                    else:
                        time.sleep(1.0)
                        tps = None
                    seconds = time.perf_counter() - began
                    loops = (load.rounds - before) / seconds
                finally:
                    load.close()
                print(json.dumps({"tps": tps, "loops_per_s": loops}), file=out, flush=True)


class Application:
    """The other end of `application`."""

    def __init__(self, mode: str, options: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), "--serve", mode, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **threads_environment(1), "OPENBLAS_NUM_THREADS": "1"},
            text=True,
        )
        self.environment = self._line()["environment"]

    def ask(self, load: str, tokens: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"load": load, "tokens": tokens}) + "\n")
        self._process.stdin.flush()
        return self._line()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise BenchmarkError("an application ended early; what it printed says why")
        answer: dict[str, Any] = json.loads(line)
        return answer


def run(options: dict[str, Any], rounds: int, tokens: int) -> dict[str, Any]:
    """The result document."""
    samples: dict[str, dict[str, list[dict[str, Any]]]] = {}
    with ExitStack() as stack:
        apps = {}
        for mode in MODES:
            apps[mode] = Application(mode, options)
            stack.callback(apps[mode].close)
            samples[mode] = {load: [] for load in LOADS}
        free = {load: apps["thread"].ask(load, 0)["loops_per_s"] for load in LOADS[1:3]}
        for turn in range(rounds):
            for load in LOADS if turn % 2 == 0 else LOADS[::-1]:
                for mode in MODES:
                    samples[mode][load].append(apps[mode].ask(load, tokens))
            print(f"round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
        environment = {mode: app.environment for mode, app in apps.items()}
    return {
        "benchmark": "contention",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": {"rounds": rounds, "tokens": tokens},
        "software": versions().model_dump(),
        "device": device_of(engine_device()).model_dump(),
        "environment": environment,
        "loops_per_s_alone": free,
        "found": {m: {load: _found(samples[m], load, free) for load in LOADS} for m in MODES},
        "samples": samples,
    }


def _found(samples: dict[str, Any], load: str, free: dict[str, float]) -> dict[str, Any]:
    shares = [b["tps"] / a["tps"] for a, b in zip(samples["idle"], samples[load], strict=True)]
    tps = [one["tps"] for one in samples[load]]
    loops = statistics.median(one["loops_per_s"] for one in samples[load])
    return {
        "tps": statistics.median(tps),
        "of_idle": statistics.median(shares),
        "of_idle_min": min(shares),
        "of_idle_max": max(shares),
        "loop_of_alone": loops / free[load] if load in free else None,
    }


def table(document: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| engine | application | tok/s | of idle | its loop |", "|---|---|---|---|---|"]
    for mode, loads in document["found"].items():
        for load, one in loads.items():
            share = f"{one['of_idle']:.2f} ({one['of_idle_min']:.2f}–{one['of_idle_max']:.2f})"
            loop = "" if one["loop_of_alone"] is None else f"{one['loop_of_alone']:.2f}"
            lines.append(f"| {mode} | {load} | {one['tps']:.1f} | {share} | {loop} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="stub")
    parser.add_argument("--options", type=json.loads, default={}, help="more of EdgeVLM, as JSON")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=65)
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve is not None:
        application(asked.serve[0], json.loads(asked.serve[1]))
        return
    options = {"model": asked.model, "max_model_len": 1024, "max_num_seqs": 1, **asked.options}
    try:
        document = run({"kv_cache_memory_gb": 0.1, **options}, asked.rounds, asked.tokens)
    except MolmoEdgeError as exc:
        sys.exit(f"error: {exc}")
    print(table(document))
    if asked.output is not None:
        document["command"] = " ".join(["python", "benchmarks/contention.py", *sys.argv[1:]])
        write_bytes(f"{json.dumps(document, indent=1)}\n".encode(), asked.output)


if __name__ == "__main__":
    main()
