"""Proof on one GPU: right answers, quantisation, overhead, concurrency, starts, sensors, endurance.

One JSON document, made of cases. Each case runs in a process of its own and keeps what it measured
when it fails or its time is up; started again on the same file, the script does what is missing. A
combination that this machine cannot run is recorded with vLLM's reason and is no failure.

    python benchmarks/gpu_check.py --output gpu.json                     # all of it, about an hour
    python benchmarks/gpu_check.py --output gpu.json --stages decode,warm
    python benchmarks/gpu_check.py --device cpu --output cpu.json        # the same code, small
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from _checks import run_case
from _plans import LIMITS_S, STAGES, Case, cases, with_backends
from _summary import markdown

from molmo_edge.bench.document import write_bytes
from molmo_edge.bench.environment import device_of, versions
from molmo_edge.devices.detect import DeviceInfo
from molmo_edge.engine.build import engine_device
from molmo_edge.errors import BenchmarkError, EngineStartError, MolmoEdgeError

FORMAT, VERSION = "molmo-edge-gpu-check", 1
DONE = ("ok", "unusable")
"""Cases that are not run again."""


def begin(output: Path, device: DeviceInfo) -> dict[str, Any]:
    """The document to go on with: the file's, if it is of this machine and software, or a new one.

    Raises:
        BenchmarkError: the file is something else, or of another machine or software.
    """
    fresh: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "software": versions().model_dump(),
        "device": device_of(device).model_dump(),
        "stages": {},
    }
    if not output.exists():
        return fresh
    try:
        found = json.loads(output.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise BenchmarkError(f"{output} cannot be read as a result; choose another file") from exc
    if not isinstance(found, dict) or (found.get("format"), found.get("version")) != (
        FORMAT,
        VERSION,
    ):
        raise BenchmarkError(f"{output} is not a result of this script; choose another file")
    now, then = [
        (one["software"], one["device"]["name"], one["device"]["driver"]) for one in (fresh, found)
    ]
    if now != then:
        raise BenchmarkError(
            f"{output} was measured with other software or on another device; choose another file"
        )
    return found


def run(
    planned: Sequence[Case],
    output: Path,
    device: DeviceInfo,
    *,
    limits_s: Mapping[str, float] = LIMITS_S,
    again: bool = False,
) -> dict[str, Any]:
    """Runs the cases that the file lacks, writing it after each; returns the document."""
    document = begin(output, device)
    for stage in dict.fromkeys(case.stage for case in planned):
        ends = time.monotonic() + limits_s[stage]
        kept = document["stages"].setdefault(stage, {})
        for case in [one for one in planned if one.stage == stage]:
            if kept.get(case.name, {}).get("status") in DONE and not again:
                continue
            left = ends - time.monotonic()
            if left < 1:
                kept.setdefault(case.name, {"status": "not run", "error": "the stage's time is up"})
                continue
            print(f"{stage}: {case.name} …", file=sys.stderr, end=" ", flush=True)
            kept[case.name] = in_process(case, left)
            print(f"{kept[case.name]['status']}, {kept[case.name]['seconds']:.0f} s",
                  file=sys.stderr)  # fmt: skip
            write_bytes(f"{json.dumps(document, indent=1)}\n".encode(), output)
    write_bytes(f"{json.dumps(document, indent=1)}\n".encode(), output)
    return document


def in_process(case: Case, limit_s: float) -> dict[str, Any]:
    """One case in a process of its own: status, seconds, options, what was found, and the error."""
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
        parts, log = Path(name) / "parts", Path(name) / "log"
        began = time.monotonic()
        with log.open("w") as file:
            child = subprocess.Popen(
                [sys.executable, __file__, "--case", json.dumps(asdict(case)), "--parts", parts],
                stdout=file,
                stderr=file,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                code: int | None = child.wait(limit_s)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                # Its children too: servers and other starts.
                _end(child)
        found: dict[str, Any] = {}
        if parts.exists():
            for line in parts.read_text(encoding="utf-8").splitlines():
                found.update(json.loads(line))
        outcome = found.pop("outcome", None)
        status = "timeout" if code is None else "failed"
        error = None if code is None else f"exit status {code}: {_tail(log)}"
        if outcome is not None:
            status, error = outcome["status"], outcome["error"]
        return {
            "status": status,
            "seconds": time.monotonic() - began,
            "options": dict(case.options),
            "error": error,
            "found": found,
        }


def _end(child: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()


def _tail(log: Path) -> str:
    return log.read_text(errors="replace").strip()[-1500:]


def child(text: str, parts: Path) -> None:
    """Runs one case here; what became of it is the last part."""
    case = Case(**json.loads(text))
    status, error = "ok", None
    try:
        run_case(case.kind or case.stage, case.options, parts)
    except EngineStartError as exc:
        status, error = "unusable", _reasons(exc)
    except MolmoEdgeError as exc:
        status, error = "failed", _reasons(exc)
    with parts.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"outcome": {"status": status, "error": error}}) + "\n")


def _reasons(exc: BaseException | None) -> str:
    """An error and those it came from, the last lines of each."""
    lines: list[str] = []
    while exc is not None and len(lines) < 4:
        lines.append(f"{type(exc).__name__}: {str(exc).strip()[-600:]}")
        exc = exc.__cause__
    return " <- ".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=Path("gpu-check.json"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--stages", default=",".join(STAGES), help="of " + ", ".join(STAGES))
    parser.add_argument("--cases", help="only cases whose name contains this")
    parser.add_argument("--limit", type=float, help="seconds of each stage, instead of its own")
    parser.add_argument("--attention", help="language backend of cases that name none")
    parser.add_argument("--vision", help="vision backend of cases that name none")
    parser.add_argument("--again", action="store_true", help="run finished cases once more")
    parser.add_argument("--table", action="store_true", help="only print the file's tables")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--parts", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.case is not None:
        child(asked.case, asked.parts)
        return
    try:
        if asked.table:
            print(markdown(json.loads(asked.output.read_text(encoding="utf-8"))))
            return
        wanted = [name.strip() for name in asked.stages.split(",")]
        if unknown := sorted(set(wanted) - set(STAGES)):
            raise BenchmarkError(f"unknown stage {unknown[0]}; stages are {', '.join(STAGES)}")
        device = engine_device()
        if device.kind != asked.device:
            raise BenchmarkError(
                f"vLLM would run on {device.kind} here, not on {asked.device}; molmo-edge doctor "
                "says why"
            )
        planned = [
            with_backends(case, asked.attention, asked.vision)
            for case in cases(asked.device, gpu_bytes=device.memory_total_bytes)
            if case.stage in wanted and (asked.cases is None or asked.cases in case.name)
        ]
        limits = {name: asked.limit or LIMITS_S[name] for name in STAGES}
        document = run(planned, asked.output, device, limits_s=limits, again=asked.again)
    except MolmoEdgeError as exc:
        sys.exit(f"error: {exc}")
    print(markdown(document))
    every = [one for stage in document["stages"].values() for one in stage.values()]
    sys.exit(0 if all(one["status"] in DONE for one in every) else 1)


if __name__ == "__main__":
    main()
