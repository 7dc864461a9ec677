"""A result document for programs: CSV and JSON lines with one flat record a row, or whole JSON."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

from molmo_edge.bench.document import Document, Summary
from molmo_edge.bench.store import dumps
from molmo_edge.bench.tables import markdown, part


def flat(document: Document) -> list[dict[str, Any]]:
    """One flat record a row, for CSV and JSON lines; the same keys in every record."""
    software, model = document.environment.software, document.environment.model
    records = []
    for scenario in document.scenarios:
        for row in scenario.rows:
            record: dict[str, Any] = {
                "created": document.created,
                "complete": document.complete,
                "device": document.environment.device.name,
                "power_mode": document.environment.device.power_mode,
                "model": model.name,
                "random_weights": model.random_weights,
                "precision": model.precision,
                "kv_cache_dtype": model.kv_cache_dtype,
                "vllm": software.vllm,
                "torch": software.torch,
                "transformers": software.transformers,
                "scenario": scenario.name,
                "case": row.name,
                "title": row.title,
                "iterations": len(row.waves) or len(row.samples),
                "steady_from": row.warmup.start if row.warmup else None,
                "stopped": row.stopped,
                "caches": row.caches.mode if row.caches else None,
                "caches_proved": row.caches.proved if row.caches else None,
            }
            for name in ("preprocess_s", "ttft_s", "tpot_s", "itl_s"):
                summary = part(row).get(name, Summary())
                record |= {f"{name}_{k}": getattr(summary, k) for k in ("p50", "p90", "p99")}
            for name in ("output_tps", "request_tps", "total_tps"):
                summary = part(row).get(name, Summary())
                keys = ("mean", "std", "min", "max", "ci_low", "ci_high")
                record |= {f"{name}_{k}": getattr(summary, k) for k in keys}
            ceiling = row.ceiling
            for key in ("bytes_per_token", "bandwidth_share", "watts", "joules_per_token"):
                record[key] = getattr(ceiling, key) if ceiling else None
            records.append(record)
    return records


def render(document: Document, form: str) -> str:
    """The document as ``md``, ``csv``, ``json`` or ``jsonl`` text.

    Raises:
        ValueError: ``form`` is none of these.
    """
    if form == "md":
        return markdown(document)
    if form == "json":
        return dumps(document) + "\n"
    if form == "jsonl":
        return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in flat(document))
    if form != "csv":
        raise ValueError("form must be md, csv, json or jsonl")
    records = flat(document)
    buffer = io.StringIO()
    if records:
        writer = csv.DictWriter(buffer, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    return buffer.getvalue()
