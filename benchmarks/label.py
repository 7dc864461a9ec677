"""`molmo-edge label`: its rate, memory and restarts, and the same table by a Ray cluster.

    python benchmarks/label.py --output benchmarks/results/label-cpu.json

Rate: one engine answers about the same files in turns, in changing order: by `label`; as inputs
prepared before the clock started, twice, the second against the first being the noise floor; and in
a loop over `EdgeVLM.query`. The whole is repeated in fresh processes. Memory: a run of 2,000 rows.
Restarts: a run that is killed ten times at random moments. Cluster: two actors, one of which is
killed. Tables are compared but for times.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import bulk
import harness
import numpy as np
import psutil
import pyarrow.parquet as pq
from PIL import Image

from molmo_edge.bench.tables import table

PREPARED_RATIO, LOOP_RATIO = 0.95, 1.2
"""Promised minima of the rate over those of prepared inputs and of a loop."""

SIDES = ("label", "prepared", "again", "loop")
RATIOS = {
    "of_prepared": ("label", "prepared"),
    "floor": ("again", "prepared"),
    "of_loop": ("label", "loop"),
}
TEXT = bulk.TEXT
LIMIT_S = 3600.0
BROKEN = (123, 456)
KILLS = 10


def write_images(directory: Path, count: int, broken: Sequence[int] = ()) -> None:
    """Different JPEG files of 640 x 480 pixels, some of them cut short."""
    chance = np.random.default_rng(0)
    for number in range(count):
        path = directory / f"{number:05}.jpg"
        pixels = chance.integers(0, 256, (480, 640, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, quality=80)
        if number in broken:
            path.write_bytes(path.read_bytes()[:200])


def answer_label(vlm: Any, directory: Path, tokens: int) -> Callable[[], int]:
    """What labels the files; it returns the number of rows without an error."""
    from molmo_edge.label import Source, label

    def answer() -> int:
        with tempfile.TemporaryDirectory() as out:
            tasks = [{"name": "text", "ask": TEXT}]
            done = label(
                Source([str(directory)]), out, tasks, engine=vlm, max_tokens=tokens, ignore_eos=True
            )
        return done.done - done.errors

    return answer


def answer_prepared(vlm: Any, directory: Path, tokens: int) -> Callable[[], int]:
    images = [Image.open(path) for path in sorted(directory.iterdir())]
    prepared = bulk.answer_prepared(vlm, images, tokens)
    return lambda: len(prepared())


def answer_loop(vlm: Any, directory: Path, tokens: int) -> Callable[[], int]:
    def answer() -> int:
        paths = sorted(directory.iterdir())
        return len([vlm.query(p, TEXT, max_tokens=tokens, ignore_eos=True) for p in paths])

    return answer


PREPARE = {
    "label": answer_label,
    "prepared": answer_prepared,
    "again": answer_prepared,
    "loop": answer_loop,
}


def measure_start(emit: harness.Emit, options: Mapping[str, Any]) -> None:
    """One process: emits its rounds, side → seconds, as they are measured."""
    from molmo_edge import EdgeVLM

    rounds = []
    with tempfile.TemporaryDirectory() as name, EdgeVLM(**options["engine"]) as vlm:
        directory = Path(name)
        emit("environment", dict(vlm.environment))
        write_images(directory, 4)
        for side in SIDES:
            PREPARE[side](vlm, directory, options["tokens"])()
        write_images(directory, options["images"])

        def prepare(side: str) -> Callable[[], int]:
            return PREPARE[side](vlm, directory, options["tokens"])

        timed = harness.timed_rounds(SIDES, prepare, vlm.reset_caches, options["rounds"])
        for seconds, answers in timed:
            assert set(answers.values()) == {options["images"]}
            rounds.append(seconds)
            emit("rounds", rounds)


def measure_memory(emit: harness.Emit, options: Mapping[str, Any]) -> None:
    """One process: emits the resident bytes after 200 and after 2,000 rows."""
    from molmo_edge.label import Source, label

    bytes_at: dict[int, int] = {}

    def progress(state: Any) -> None:
        if state.done in (200, 2000):
            bytes_at[state.done] = psutil.Process().memory_info().rss

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name, "images")
        directory.mkdir()
        write_images(directory, 2000)
        tasks = [{"name": "text", "ask": TEXT}]
        label(
            Source([str(directory)]), Path(name, "out"), tasks, engine=options["engine"],
            max_tokens=options["tokens"], ignore_eos=True, flush_s=5.0, progress=progress,
        )  # fmt: skip
    emit("rss", {"200": bytes_at[200], "2000": bytes_at[2000]})


def command(engine: Mapping[str, Any], directory: Path, out: Path, *more: str) -> list[str]:
    """The command line; other settings of the engine are in the environment."""
    start = [sys.executable, "-m", "molmo_edge", "label", str(directory), "--out", str(out)]
    return [*start, "--model", engine["model"], "--ask", f"text={TEXT}", "--max-tokens", "8", *more]


def environment(engine: Mapping[str, Any]) -> dict[str, str]:
    own = {f"MOLMO_EDGE_{name.upper()}": str(v) for name, v in engine.items() if name != "model"}
    return {**os.environ, **own, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def rows(out: Path) -> list[dict[str, Any]]:
    read: list[dict[str, Any]] = pq.read_table(out).drop_columns(["seconds"]).to_pylist()
    return read


def measure_kills(emit: harness.Emit, options: Mapping[str, Any]) -> None:
    """Emits how a table came out whose run was killed at random moments."""
    chance, engine, count = random.Random(0), options["engine"], options["rows"]
    with tempfile.TemporaryDirectory() as name:
        directory, out = Path(name, "images"), Path(name, "out")
        directory.mkdir()
        write_images(directory, count, BROKEN)
        kills, starts, at = 0, 0, []
        while True:
            starts += 1
            child = subprocess.Popen(
                command(engine, directory, out, "--flush", "1s"), env=environment(engine)
            )
            try:
                code = child.wait(chance.uniform(5, 20) if kills < KILLS else None)
            except subprocess.TimeoutExpired:
                child.send_signal(signal.SIGKILL)
                child.wait()
                kills += 1
                at.append(len(rows(out)) if list(out.glob("part-*")) else 0)
                continue
            break
        table_rows = rows(out)
        emit("kills", {
            "kills": kills, "starts": starts, "rows_at_each": at, "status": code,
            "rows": len(table_rows), "different": len({row["row"] for row in table_rows}),
            "errors": [row["row"] for row in table_rows if row["error"]],
        })  # fmt: skip


def measure_cluster(emit: harness.Emit, options: Mapping[str, Any]) -> None:
    """Emits whether two actors, and two of which one is killed, make the table of one machine."""
    engine, count = options["engine"], options["rows"]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name, "images")
        directory.mkdir()
        write_images(directory, count, BROKEN)
        outs = [Path(name, side) for side in ("one", "two", "killed")]
        more = ["--ray", "--engines", "2"]
        seconds, killed = [], 0
        for out, extra in zip(outs, ([], more, more), strict=True):
            began = time.monotonic()
            child = subprocess.Popen(
                command(engine, directory, out, "--flush", "3s", *extra), env=environment(engine)
            )
            while child.poll() is None:
                time.sleep(0.2)
                if out.name == "killed" and not killed and list(out.glob("part-*")):
                    killed = kill_actor(child.pid)
            seconds.append(time.monotonic() - began)
        tables = [rows(out) for out in outs]
        emit("cluster", {
            "rows": count, "seconds": seconds, "killed": int(killed > 0),
            "equal": tables[0] == tables[1], "equal_killed": tables[0] == tables[2],
        })  # fmt: skip


def kill_actor(parent: int) -> int:
    """Kill one of Ray's actors below a process; return its number, 0 for none."""
    for process in psutil.Process(parent).children(recursive=True):
        with suppress(psutil.Error):  # it ended meanwhile
            if "MapWorker" in " ".join(process.cmdline()):
                process.kill()
                return process.pid
    return 0


def evaluate(starts: Sequence[Sequence[Mapping[str, float]]], images: int) -> dict[str, Any]:
    """Rates of the sides, in rows per second, and their ratios over the rounds of every start."""
    out = harness.rate_ratios(starts, images, RATIOS)
    out["passed"] = (
        out["of_prepared"]["median"] >= PREPARED_RATIO and out["of_loop"]["median"] >= LOOP_RATIO
    )
    return out


def run(
    engine: Mapping[str, Any], *, parts: Sequence[str], starts: int, rounds: int, images: int,
    total: int, tokens: int, threads: int,
) -> dict[str, Any]:  # fmt: skip
    """Measure; `engine` has keyword arguments of `EdgeVLM`, the rest is that of the options."""
    plan = {"rounds": rounds, "images": images, "tokens": tokens, "rows": total}
    options = {"engine": engine, **plan}
    figures: dict[str, Any] = {}
    measured: list[dict[str, Any]] = []
    if "rate" in parts:
        measured = harness.run_starts(
            __file__, options, starts=starts, limit_s=LIMIT_S, threads=threads
        )
        figures["rate"] = evaluate([values["rounds"] for values in measured], images)
    for part in ("memory", "kills", "cluster"):
        if part in parts:
            outcome = harness.run_child(__file__, part, options, limit_s=LIMIT_S, threads=threads)
            figures |= outcome["values"] or {part: outcome}
    return harness.result(
        "label",
        settings={"engine": engine, "starts": starts, "threads": threads, **plan},
        environment=measured[-1]["environment"] if measured else {},
        result=figures,
        rounds=[values["rounds"] for values in measured],
    )


def markdown(*documents: Mapping[str, Any]) -> str:
    """Markdown: the rate of `label`, and its ratios to the other sides."""
    rows = [
        harness.rate_row(one["settings"], one["result"]["rate"], "label", RATIOS)
        for one in documents
    ]
    heads = ["", "images", "rows/s", "÷ prepared", "floor", "÷ loop over query"]
    return table(heads, rows)


def main() -> None:
    harness.serve_child(
        {
            "start": measure_start,
            "memory": measure_memory,
            "kills": measure_kills,
            "cluster": measure_cluster,
        }
    )
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo", help="checkpoint directory, hub name, or stub")
    parser.add_argument("--options", type=json.loads, default={}, help="of EdgeVLM, as JSON")
    parser.add_argument("--parts", default="rate,memory,kills,cluster", help="what to measure")
    parser.add_argument("--starts", type=int, default=3, help="fresh processes")
    parser.add_argument("--rounds", type=int, default=4, help="in each start")
    parser.add_argument("--images", type=int, default=200, help="of a round")
    parser.add_argument("--rows", type=int, default=500, help="of the runs that are killed")
    parser.add_argument("--tokens", type=int, default=8, help="of each answer")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU engine; 0: vLLM's choice")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    document = run(
        {"model": arguments.model, **arguments.options},
        parts=arguments.parts.split(","),
        starts=arguments.starts,
        rounds=arguments.rounds,
        images=arguments.images,
        total=arguments.rows,
        tokens=arguments.tokens,
        threads=arguments.threads,
    )
    if "rate" in document["result"]:
        print(markdown(document))
    print(json.dumps({k: v for k, v in document["result"].items() if k != "rate"}, indent=1))
    harness.write(document, arguments.output)


if __name__ == "__main__":
    harness.start(main)
