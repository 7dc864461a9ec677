"""Preprocessing against TensorFlow's path and the plain yardstick, side by side in one run.

    python benchmarks/preprocess.py --output benchmarks/results/preprocess.json

The ways take turns on every repetition, so that whatever else the machine does falls on all of
them. A way's ratio is the median over repetitions of (its time / our time in the same repetition).
Also measured: CPU time of all threads, which other work on the machine disturbs less, the largest
difference of pixels, and what a fresh process's memory grows by.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SIZES = ((480, 640), (1080, 1920), (3000, 4000))
CROPS = 12
OURS = "molmo_edge"

MEMORY = """
import pathlib, sys
import numpy as np, torch
from molmo_edge.models.molmo.image_processor import MolmoImageProcessor
torch.set_num_threads(int(sys.argv[3]))
def kib(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])
image = np.full((int(sys.argv[1]), int(sys.argv[2]), 3), 127, np.uint8)
processor = MolmoImageProcessor()
processor.inputs(image[:240, :320])
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = kib("VmRSS")
made = processor.inputs(image)
height, width = made.layout.pixel_shape
print((kib("VmHWM") - before) * 1024, made.images.nbytes, height * width * 12)
"""


def picture(height: int, width: int) -> np.ndarray:
    """Smooth shapes with noise, (height, width, 3) uint8."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    waves = [127 + 100 * np.sin(x / a + y / b) for a, b in ((7, 11), (19, 31), (45, 5))]
    base = np.stack(waves, axis=-1)
    return np.clip(base + rng.normal(0, 20, base.shape), 0, 255).astype(np.uint8)


def ways() -> dict[str, Callable[[Any], Any]]:
    """Name → a function from a picture to patches."""
    from molmo_edge.models.molmo import resize
    from molmo_edge.models.molmo.image_processor import MolmoImageProcessor
    from molmo_edge.reference import molmo as reference

    ours = MolmoImageProcessor(CROPS)
    special = reference.SpecialTokens(1, 2, 3, 4)

    def by_torch(image: np.ndarray) -> Any:
        kept, resize._kernel[:] = list(resize._kernel), [None]
        try:
            return ours.inputs(image).images.numpy()
        finally:
            resize._kernel[:] = kept

    def processor(resize_by: Any) -> Callable[[np.ndarray], Any]:
        made = MolmoImageProcessor(CROPS, resize_by)
        return lambda image: made.inputs(image).images.numpy()

    found = {
        OURS: processor("torch"),
        "molmo_edge, from PIL": processor("torch"),
        "molmo_edge, by torch": by_torch,
        "yardstick": lambda image: reference.preprocess(image, special, CROPS).images,
    }
    if importlib.util.find_spec("tensorflow") is not None:
        found["tensorflow"] = processor("tensorflow")
    return found


def measure(height: int, width: int, repeats: int, threads: int) -> dict[str, Any]:
    """One size: milliseconds of every way, ratios to ours, pixel differences, memory."""
    from PIL import Image

    image = picture(height, width)
    pil = Image.fromarray(image)
    every = ways()
    expected = every["yardstick"](image)
    samples: dict[str, list[float]] = {name: [] for name in every}
    cpu: dict[str, list[float]] = {name: [] for name in every}
    difference = {}
    for name, way in every.items():
        difference[name] = float(np.abs(way(image) - expected).max())
    for _ in range(repeats):
        for name, way in every.items():
            given = pil if name.endswith("PIL") else image
            began, worked = time.perf_counter(), time.process_time()
            way(given)
            samples[name].append((time.perf_counter() - began) * 1e3)
            cpu[name].append((time.process_time() - worked) * 1e3)
    rows = {
        name: {
            "ms": spread(times),
            "times_ours": statistics.median(
                a / b for a, b in zip(times, samples[OURS], strict=True)
            ),
            "cpu_ms": statistics.median(cpu[name]),
            "max_pixel_difference": difference[name],
            "samples_ms": [round(t, 3) for t in times],
        }
        for name, times in samples.items()
    }
    grown = memory(height, width, threads)
    return {"height": height, "width": width, "ways": rows, "memory": grown}


def spread(values: list[float]) -> dict[str, float]:
    """Least, quartiles and largest of at least two values."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"min": min(values), "q1": low, "median": middle, "q3": high, "max": max(values)}


def memory(height: int, width: int, threads: int) -> dict[str, int] | None:
    """Growth of a fresh process's memory by one picture, None where Linux's /proc is not."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(height), str(width), str(threads)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    grown, output, resized = map(int, done.stdout.split())
    return {
        "grown_bytes": grown,
        "output_bytes": output,
        "resized_picture_bytes": resized,
        "allowed_bytes": output + 2 * resized,
    }


def environment(threads: int) -> dict[str, Any]:
    """What the numbers were made with."""
    from molmo_edge.bench.environment import device_of, versions
    from molmo_edge.devices.detect import detect

    software = versions().model_dump()
    for name in ("numba", "numpy", "tensorflow", "pillow"):
        if importlib.util.find_spec({"pillow": "PIL"}.get(name, name)) is not None:
            software[name] = importlib.metadata.version(name)
    return {
        "software": software,
        "device": device_of(detect()).model_dump(),
        "threads": threads,
        "load_average": list(os.getloadavg()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--note", help="what else is to be known, such as a shared machine")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.repeats < 2:
        parser.error("--repeats must be at least 2")
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", str(arguments.threads))
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import torch

    torch.set_num_threads(arguments.threads)
    results = []
    for height, width in SIZES:
        results.append(measure(height, width, arguments.repeats, arguments.threads))
        print(f"{width} × {height}")
        for name, row in results[-1]["ways"].items():
            ms = row["ms"]
            print(
                f"  {name:26} median {ms['median']:7.1f} ms  ({ms['q1']:.1f}-{ms['q3']:.1f}, "
                f"min {ms['min']:.1f})  {row['times_ours']:5.1f} × ours  "
                f"CPU {row['cpu_ms']:.1f} ms  pixels off by {row['max_pixel_difference']:.1e}"
            )
        if results[-1]["memory"] is not None:
            found = results[-1]["memory"]
            print(
                f"  memory grows by {found['grown_bytes'] / 1e6:.1f} MB, "
                f"{found['output_bytes'] / 1e6:.1f} of it output; allowed "
                f"{found['allowed_bytes'] / 1e6:.1f}"
            )
    document = {
        "benchmark": "preprocess",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": ["python", "benchmarks/preprocess.py", *sys.argv[1:]],
        "max_crops": CROPS,
        "note": arguments.note,
        "environment": environment(arguments.threads),
        "results": results,
    }
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
