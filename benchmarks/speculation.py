"""N-gram drafts against none: the same greedy answers, drafts accepted, tokens a second.

    python benchmarks/speculation.py --output benchmarks/results/speculation.json

Both engines answer the same prompts in float32, one engine after the other; every answer must be
equal token for token, or the run fails. What is accepted depends on the checkpoint: the stub
repeats one sentence, so its acceptance is near the most there can be, and says nothing of Molmo.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from PIL import Image

QUESTIONS = {
    "point": "Point to the trees.",
    "count": "How many trees are there?",
    "caption": "Describe this image.",
}


def run(model: str, speculation: str, image: Image.Image, arguments: Any) -> dict[str, Any]:
    """Answers, decode speeds and drafts of one engine."""
    from molmo_edge import EdgeVLM

    rows: dict[str, Any] = {}
    with EdgeVLM(
        model, dtype=arguments.dtype, max_model_len=2048, max_num_seqs=1, kv_cache_memory_gb=0.25,
        speculation=speculation, engine_args={"disable_log_stats": False},
    ) as vlm:  # fmt: skip
        environment = dict(vlm.environment)
        vlm.query(image, "Warm up.", max_tokens=8, ignore_eos=True)
        for name, question in QUESTIONS.items():
            before = drafts(vlm)
            results = [
                vlm.query(image, question, max_tokens=arguments.tokens, ignore_eos=True)
                for _ in range(arguments.repeats)
            ]
            drafted, accepted = (b - a for a, b in zip(before, drafts(vlm), strict=True))
            rows[name] = {
                "token_ids": [list(result.token_ids) for result in results],
                "output_tps": [result.metrics.output_tps for result in results],
                "drafted": drafted,
                "accepted": accepted,
            }
    return {"environment": environment, "rows": rows}


def drafts(vlm: Any) -> tuple[int, int]:
    """Tokens drafted and accepted so far."""
    metrics = vlm.in_engine_thread(lambda engine: engine.llm.get_metrics())
    counts = {metric.name: getattr(metric, "value", 0) for metric in metrics}
    names = "num_draft_tokens", "num_accepted_tokens"
    drafted, accepted = (int(counts.get(f"vllm:spec_decode_{name}", 0)) for name in names)
    return drafted, accepted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="stub")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--image", type=Path, help="left out, a seeded picture")
    parser.add_argument("--note")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.image is None:
        from molmo_edge.reference.verify import picture

        image = Image.fromarray(picture(300, 300, 0))
    else:
        image = Image.open(arguments.image).convert("RGB")
    off = run(arguments.model, "off", image, arguments)
    on = run(arguments.model, "ngram", image, arguments)
    rows = {}
    for name in QUESTIONS:
        a, b = off["rows"][name], on["rows"][name]
        if a["token_ids"] != b["token_ids"]:
            sys.exit(f"{name}: drafts changed the answer")
        rate = b["accepted"] / b["drafted"] if b["drafted"] else None
        speed = statistics.median(b["output_tps"]) / statistics.median(a["output_tps"])
        rows[name] = {
            "tokens_equal": True,
            "drafted": b["drafted"],
            "accepted": b["accepted"],
            "acceptance": rate,
            "output_tps_off": a["output_tps"],
            "output_tps_on": b["output_tps"],
            "on_over_off": speed,
        }
        told = "none drafted" if rate is None else f"{rate:.2f} accepted"
        print(f"{name}: equal, {told}, {speed:.2f} × the tokens a second")
    document = {
        "benchmark": "speculation",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": ["python", "benchmarks/speculation.py", *sys.argv[1:]],
        "note": arguments.note,
        "load_average": list(os.getloadavg()),
        "environment": on["environment"],
        "rows": rows,
    }
    if arguments.output is not None:

        write_text(json.dumps(document, indent=1, default=str) + "\n", arguments.output)


if __name__ == "__main__":
    main()
