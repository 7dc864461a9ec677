"""The tables of a `gpu_check.py` document, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

UNKNOWN = "–"


def markdown(document: Mapping[str, Any]) -> str:
    """Machine, software and a table for each stage that has cases."""
    device, software = document["device"], document["software"]
    head = [
        f"{device['name']}, driver {device['driver'] or UNKNOWN}, CUDA {device['cuda'] or UNKNOWN}",
        ", ".join(f"{name} {version}" for name, version in software.items() if version),
    ]
    stages = document["stages"]
    parts = [part for name in TABLES if (part := _stage(name, stages.get(name, {}), stages))]
    return "\n\n".join(["; ".join(head), *parts])


def _stage(name: str, found: Mapping[str, Any], stages: Mapping[str, Any]) -> str | None:
    if not found:
        return None
    heads, rows = TABLES[name](found, stages)
    other = [
        [case, one["status"], *[UNKNOWN] * (len(heads) - 3), _short(one.get("error"))]
        for case, one in found.items()
        if one["status"] != "ok"
    ]
    return f"### {name}\n\n{_table(heads, [*rows, *other])}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)


def _short(error: str | None) -> str:
    text = " ".join((error or UNKNOWN).split()).replace("|", "/")
    return text if len(text) <= 160 else f"…{text[-160:]}"


def _num(value: float | None, digits: int = 2) -> str:
    return UNKNOWN if value is None else f"{value:.{digits}f}"


def _of(found: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, one["found"]) for name, one in found.items() if one["status"] == "ok"]


Rows = tuple[list[str], list[list[str]]]


def _verify(found: Mapping[str, Any], stages: Mapping[str, Any]) -> Rows:
    rows = []
    for name, one in _of(found):
        for whose in ("ours", "stock"):
            if (report := one.get(whose)) is not None:
                verdict = "right" if report["ok"] else "WRONG"
                rows.append([name, whose, verdict, f"{report['max_dlogprob']:.2g}",
                             f"{report['bound']:g}"])  # fmt: skip
    return ["case", "model", "verdict", "max abs dlogprob", "bound"], rows


def _decode(found: Mapping[str, Any], stages: Mapping[str, Any]) -> Rows:
    copied = found.get("copy", {}).get("found", {}).get("bandwidth_bytes_s")
    rows = []
    if copied:
        rows.append([f"copy: {copied / 1e9:.0f} GB/s", *[UNKNOWN] * 5])
    for name, one in _of(found):
        if not one.get("decode_tps"):
            continue
        speed, step = statistics.median(one["decode_tps"]), one["bytes_per_token"]
        share = speed * step / copied if copied and step else None
        ttft = [
            statistics.median(one[f"ttft_{crops}_crops"]["ttft_s"])
            if f"ttft_{crops}_crops" in one else None
            for crops in ("2", "13")
        ]  # fmt: skip
        rows.append([name, _num(speed, 1), UNKNOWN if step is None else f"{step / 1e9:.2f}",
                     UNKNOWN if share is None else f"{share:.0%}", _num(ttft[0], 3),
                     _num(ttft[1], 3)])  # fmt: skip
    return ["weights, KV", "tok/s", "GB a token", "share of copy bandwidth", "TTFT, 2 crops (s)",
            "TTFT, 13 crops (s)"], rows  # fmt: skip


def _overhead(found: Mapping[str, Any], stages: Mapping[str, Any]) -> Rows:
    rows = []
    for name, one in _of(found):
        for other, pair in one["against"].items():
            cells = [
                f"{pair[key]['median']:.3f} ({_num(pair[key]['low'], 3)}–"
                f"{_num(pair[key]['high'], 3)})"
                for key in ("decode_tps", "ttft_s")
            ]
            rows.append([name, other, *cells, str(pair["decode_tps"]["pairs"])])
    return ["model", "against", "decode tok/s, ours ÷ other", "TTFT, ours ÷ other", "pairs"], rows


def _concurrency(found: Mapping[str, Any], stages: Mapping[str, Any]) -> Rows:
    rows = [
        [str(row["users"]), _num(row["total_tps"], 1), _num(row["user_tps"], 1),
         _num(row["ttft_s"], 3)]
        for _, one in _of(found)
        for row in one["rows"]
    ]  # fmt: skip
    return ["together", "tok/s in all", "tok/s each", "TTFT (s)"], rows


def _warm(found: Mapping[str, Any], stages: Mapping[str, Any]) -> Rows:
    rows = [
        [name, one["mode"], _num(one["first"]["total"], 1),
         _num(one["caches_kept_median"]["total"], 1)]
        for name, one in _of(found)
    ]  # fmt: skip
    return ["model", "mode", "first start (s)", "caches kept (s)"], rows


def _telemetry(found: Mapping[str, Any], stages: Mapping[str, Any]) -> Rows:
    rows = []
    for _, one in _of(found):
        for name in ("idle", "load"):
            part = one[name]
            watts = part["power_w"]["mean"] if part["power_w"] else None
            rows.append([name, _num(watts, 1), _num(part["energy_j"], 1),
                         part["energy_method"] or UNKNOWN, _num(part["counter_j"], 1),
                         _num(part["integrated_over_counter"], 3),
                         _num(part["joules_per_token"], 2)])  # fmt: skip
    return ["", "watts", "sampler (J)", "by", "driver's counter (J)", "integrated ÷ counter",
            "J a token"], rows  # fmt: skip


def _soak(found: Mapping[str, Any], stages: Mapping[str, Any]) -> Rows:
    rows = []
    for name, one in _of(found):
        grown = [
            UNKNOWN if (value := one["growth"][key]) is None else f"{value:+.2%}"
            for key in ("rss_bytes", "device_bytes")
        ]
        ended = ", ".join(f"{count} {kind}" for kind, count in one["ended"].items())
        rows.append([name, ended, *grown, str(one["left_in_engine"])])
    return ["load", "requests", "memory", "device memory", "left in the engine"], rows


TABLES = {
    "verify": _verify,
    "decode": _decode,
    "overhead": _overhead,
    "concurrency": _concurrency,
    "warm": _warm,
    "telemetry": _telemetry,
    "soak": _soak,
}
