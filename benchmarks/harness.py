"""Shared by the benchmark scripts: child processes, paired ratios, tables, result documents.

A measurement that needs a fresh process is a function `measure(emit, options)`. Its script is
started again with `--child`; what the function emits reaches the parent as lines of JSON, so that a
time limit or a crash leaves what was measured before it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from molmo_edge.bench import document as documents
from molmo_edge.bench.environment import detected_device
from molmo_edge.engine.vllm_args import versions
from molmo_edge.errors import BenchmarkError, ConfigError, EngineStartError, MolmoEdgeError

T = TypeVar("T")
Emit = Callable[[str, Any], None]
Measure = Callable[[Emit, Mapping[str, Any]], None]

CHILD = "--child"


def run_child(
    script: str, name: str, options: Mapping[str, Any], *, limit_s: float, threads: int = 0
) -> dict[str, Any]:
    """Run the measurement `name` of a script in a process of its own.

    `threads` are those of a CPU engine, bound to no core; 0 is vLLM's choice. The result has
    `status` ("ok", "unusable" if the device or vLLM refuses the settings, "failed" or "timeout"),
    `seconds`, `error` and `values`, the last value of each name emitted.
    """
    with tempfile.TemporaryDirectory(prefix="molmo-edge-benchmark-") as directory:
        lines, log = Path(directory, "lines"), Path(directory, "log")
        command = [sys.executable, script, CHILD, name, json.dumps(dict(options)), str(lines)]
        limits = {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        began = time.monotonic()
        with log.open("wb") as file:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, **(limits if threads else {}), "PYTHONFAULTHANDLER": "1"},
                start_new_session=True,
            )
            try:
                code: int | None = child.wait(limit_s)
            except subprocess.TimeoutExpired:
                code = None
                child.send_signal(signal.SIGABRT)  # its threads' stacks go to the log
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(5)
            finally:
                # Its own children too: engines and other starts.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        values: dict[str, Any] = {}
        for line in lines.read_text("utf-8").splitlines() if lines.exists() else ():
            values.update(json.loads(line))
        seconds = time.monotonic() - began
        outcome = values.pop("outcome", None)
        # faulthandler lists hundreds of modules after the stacks.
        end = log.read_text(errors="replace").partition("\nExtension modules:")[0].strip()
        for place in sorted(filter(None, sys.path), key=len, reverse=True):
            end = end.replace(f"{place}/", "")  # results name no directory of the machine
        end = end[-1500:]
        if code is None:
            outcome = {"status": "timeout", "error": f"ended after {limit_s:.0f} s: {end}"}
        elif outcome is None:
            outcome = {"status": "failed", "error": f"exit status {code}: {end}"}
    return {**outcome, "seconds": round(seconds, 2), "values": values}


def run_starts(
    script: str, options: Mapping[str, Any], *, starts: int, limit_s: float, threads: int
) -> list[dict[str, Any]]:
    """Values of the measurement "start" of a script, which emits `rounds`, in fresh processes."""
    measured = []
    for start in range(starts):
        child = run_child(script, "start", options, limit_s=limit_s, threads=threads)
        if not child["values"].get("rounds"):
            raise BenchmarkError(f"start {start + 1} measured nothing: {child['error']}")
        measured.append(child["values"])
        progress(f"start {start + 1} of {starts}: {len(measured[-1]['rounds'])} rounds")
    return measured


def timed_rounds(
    sides: Sequence[str],
    prepare: Callable[[str], Callable[[], T]],
    reset: Callable[[], object],
    count: int,
) -> Iterator[tuple[dict[str, float], dict[str, T]]]:
    """Time each side in turns, in changing order; yield seconds and answers of every round.

    `prepare` and `reset` run before the clock starts.
    """
    for turn in range(count):
        seconds, answers = {}, {}
        for side in sides if turn % 2 == 0 else sides[::-1]:
            answer = prepare(side)
            reset()
            began = time.perf_counter()
            answers[side] = answer()
            seconds[side] = time.perf_counter() - began
        yield seconds, answers


def rate_ratios(
    starts: Sequence[Sequence[Mapping[str, float]]],
    count: int,
    ratios: Mapping[str, tuple[str, str]],
) -> dict[str, Any]:
    """Rates of the sides, `count` by seconds, and ratios of two, over the rounds of every start."""
    rounds = [one for start in starts for one in start]
    rates = {side: [count / one[side] for one in rounds] for side in rounds[0]}
    return {
        "rates": {side: float(np.median(values)) for side, values in rates.items()},
        **{name: paired_ratio(rates[a], rates[b]) for name, (a, b) in ratios.items()},
    }


def rate_row(
    settings: Mapping[str, Any], figures: Mapping[str, Any], side: str, names: Iterable[str]
) -> list[str]:
    """Model, images, rate of a side and its ratios: a row of a table."""
    ratios = [interval_text(figures[name]) for name in names]
    rate = f"{figures['rates'][side]:.2g}"
    return [settings["engine"]["model"], str(settings["images"]), rate, *ratios]


def serve_child(measurements: Mapping[str, Measure]) -> None:
    """In a process that `run_child` started, measure and exit; elsewhere do nothing."""
    if sys.argv[1:2] != [CHILD]:
        return
    name, options, path = sys.argv[2:]
    with Path(path).open("a", encoding="utf-8") as file:

        def emit(key: str, value: Any) -> None:
            file.write(json.dumps({key: value}, default=str) + "\n")
            file.flush()

        status, error = "ok", None
        try:
            measurements[name](emit, json.loads(options))
        except MolmoEdgeError as exc:
            refused = isinstance(exc, ConfigError | EngineStartError)
            status = "unusable" if refused else "failed"
            error = _causes(exc)
        emit("outcome", {"status": status, "error": error})
    sys.exit(0)


def _causes(exc: BaseException | None) -> str:
    """An error and those it came from, the end of each message."""
    texts: list[str] = []
    while exc is not None:
        texts.append(f"{type(exc).__name__}: {str(exc).strip()[-600:]}")
        exc = exc.__cause__
    return " <- ".join(texts)


def median_interval(values: Sequence[float]) -> dict[str, Any]:
    """Median with its 95 % bootstrap interval, None below three values."""
    series = np.asarray(values, dtype=float)
    low = high = None
    if series.size >= 3:
        draws = np.random.default_rng(0).choice(series, (4000, series.size))
        low, high = (float(q) for q in np.quantile(np.median(draws, axis=1), [0.025, 0.975]))
    return {"median": float(np.median(series)), "low": low, "high": high, "count": series.size}


def paired_ratio(ours: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """Ours ÷ other of measurements in turns: the median of the pairs' own ratios.

    A disturbed pair moves it little, and slow drift of the machine not at all.
    """
    ratios = [a / b for a, b in zip(ours, other, strict=True)]
    medians = {"ours": float(np.median(ours)), "other": float(np.median(other))}
    return {**median_interval(ratios), **medians}


def interval_text(interval: Mapping[str, Any], digits: int = 3) -> str:
    """Median and interval, such as 0.981 (0.975 to 0.988)."""
    text = f"{interval['median']:.{digits}f}"
    if interval["low"] is None:
        return text
    return f"{text} ({interval['low']:.{digits}f} to {interval['high']:.{digits}f})"


def result(kind: str, **content: Any) -> dict[str, Any]:
    """A result document: what measured it, on what, and its content."""
    return {
        "format": f"molmo-edge-{kind}",
        "version": 1,
        "created": documents.now(),
        "script": Path(sys.argv[0]).name,
        "software": versions(),
        "device": detected_device().model_dump(),
        "load_average": os.getloadavg(),
        **content,
    }


def write(document: Mapping[str, Any], path: Path | None) -> None:
    """Write a result atomically where `--output` named a file."""
    if path is not None:
        documents.write(f"{json.dumps(document, indent=1, default=str)}\n", path)


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def start(main: Callable[[], object]) -> None:
    """Run a script; an error of molmo_edge is one line on standard error."""
    try:
        main()
    except MolmoEdgeError as exc:
        sys.exit(f"error: {exc}")
