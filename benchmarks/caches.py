"""What hashing a picture costs, and what prefix and encoder cache save, against caches off.

    python benchmarks/caches.py --output benchmarks/results/caches.json
    python benchmarks/caches.py --hash-only

Three ways of asking, each with caches on and off, engines one after another: one instruction with
changing pictures, one picture with changing questions, one frame repeated. Reported is the median
time to the first token, the first request of each way left out, and its ratio off / on. Hashing is
that of the renderer: BLAKE3 over the pixels of a PIL picture.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from PIL import Image

HASHED = ((480, 640), (1080, 1920), (3000, 4000))
INSTRUCTION = "You are the eye of a robot. Name the objects on the table, from left to right. " * 3


def frame(seed: int, height: int = 480, width: int = 640) -> Image.Image:
    """A seeded picture."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def hashing(repeats: int) -> list[dict[str, Any]]:
    """Milliseconds of the hash, of the array it is taken over, and of preprocessing."""
    from molmo_edge.models.molmo.image_processor import MolmoImageProcessor

    processor, rows = MolmoImageProcessor(), []
    for height, width in HASHED:
        image = frame(0, height, width)
        samples: dict[str, list[float]] = {"array": [], "blake3": [], "preprocess": []}
        processor.inputs(image)
        for _ in range(repeats):
            marks = [time.perf_counter()]
            pixels = np.asarray(image)
            marks.append(time.perf_counter())
            blake3(pixels.data).hexdigest()
            marks.append(time.perf_counter())
            processor.inputs(pixels)
            marks.append(time.perf_counter())
            for i, name in enumerate(samples):
                samples[name].append((marks[i + 1] - marks[i]) * 1e3)
        ms = {name: {"median": statistics.median(v), "min": min(v)} for name, v in samples.items()}
        rows.append({"height": height, "width": width, "ms": ms})
        told = ", ".join(f"{n} {v['median']:.1f} (min {v['min']:.1f}) ms" for n, v in ms.items())
        print(f"{width} × {height}: {told}")
    return rows


def asks(repeats: int) -> dict[str, list[tuple[Image.Image, str]]]:
    """Way of asking → (picture, question) of each request."""
    return {
        "fixed instruction, changing pictures": [
            (frame(i), INSTRUCTION) for i in range(repeats + 1)
        ],
        "fixed picture, changing questions": [
            (frame(100), f"Question {i}: what is there?") for i in range(repeats + 1)
        ],
        "repeated frame": [(frame(200), "What has changed?")] * (repeats + 1),
    }


def first_tokens(model: str, caches: bool, repeats: int) -> dict[str, list[float]]:
    """Seconds to the first token of every request but the first, by way of asking."""
    from molmo_edge import EdgeVLM

    out = {}
    with EdgeVLM(
        model, max_model_len=2048, max_num_seqs=1, kv_cache_memory_gb=0.25,
        enable_prefix_caching=caches,
    ) as vlm:  # fmt: skip
        vlm.query(frame(999), "Warm up.", max_tokens=2)
        for name, requests in asks(repeats).items():
            vlm.reset_caches()
            metrics = [vlm.query(i, q, max_tokens=2, ignore_eos=True).metrics for i, q in requests]
            out[name] = [float(m.ttft_s or 0) for m in metrics[1:]]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="stub")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--hash-only", action="store_true")
    parser.add_argument("--note")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    document: dict[str, Any] = {
        "benchmark": "caches",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": ["python", "benchmarks/caches.py", *sys.argv[1:]],
        "note": arguments.note,
        "load_average": list(os.getloadavg()),
        "hashing": hashing(max(5, arguments.repeats)),
    }
    if not arguments.hash_only:
        on = first_tokens(arguments.model, True, arguments.repeats)
        off = first_tokens(arguments.model, False, arguments.repeats)
        document["model"] = arguments.model
        document["ways"] = {
            name: {
                "ttft_s_on": on[name],
                "ttft_s_off": off[name],
                "off_over_on": statistics.median(off[name]) / statistics.median(on[name]),
            }
            for name in on
        }
        for name, way in document["ways"].items():
            print(f"{name}: off / on = {way['off_over_on']:.2f}")
    from molmo_edge.bench.environment import device_of, versions
    from molmo_edge.devices.detect import detect

    document["environment"] = {
        "software": versions().model_dump(),
        "device": device_of(detect()).model_dump(),
    }
    if arguments.output is not None:
        write_text(json.dumps(document, indent=1) + "\n", arguments.output)


if __name__ == "__main__":
    main()
