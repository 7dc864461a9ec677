"""Image preprocessing against the reference implementation and TensorFlow's path, in turns.

    python benchmarks/preprocess.py --output benchmarks/results/preprocess-cpu.json

The three take turns on every repetition, so that whatever else the machine does affects all of
them. A ratio is the median over repetitions of their time over ours in the same repetition. Also
measured: CPU time of all threads and the largest difference of pixels. TensorFlow is left out where
it is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np

from molmo_edge.errors import MolmoEdgeError

SIZES = ((480, 640), (1080, 1920), (3000, 4000))
CROPS = 12
OURS = "molmo_edge"


def make_image(height: int, width: int) -> np.ndarray:
    """Smooth shapes with noise, (height, width, 3) uint8."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    waves = [127 + 100 * np.sin(x / a + y / b) for a, b in ((7, 11), (19, 31), (45, 5))]
    noise = np.random.default_rng(0).normal(0, 20, (height, width, 3))
    return np.clip(np.stack(waves, axis=-1) + noise, 0, 255).astype(np.uint8)


def implementations() -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Name → a function from an image to patches, float32."""
    from molmo_edge.models.molmo.image_processor import MolmoImageProcessor
    from molmo_edge.models.molmo.prompts import ImageTokenIds
    from molmo_edge.reference import molmo_inputs

    special = ImageTokenIds(1, 2, 3, 4)
    ours = MolmoImageProcessor(CROPS, "torch")
    out: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        OURS: lambda image: ours.inputs(image).images.numpy(),
        "reference": lambda image: molmo_inputs.preprocess(image, special, CROPS).images,
    }
    if importlib.util.find_spec("tensorflow") is not None:
        trained = MolmoImageProcessor(CROPS, "tensorflow")
        out["tensorflow"] = lambda image: trained.inputs(image).images.numpy()
    return out


def measure(height: int, width: int, repeats: int) -> dict[str, Any]:
    """One size: milliseconds of every implementation, ratios to ours, pixel differences."""
    image, functions = make_image(height, width), implementations()
    expected = functions["reference"](image)
    off = {name: float(np.abs(f(image) - expected).max()) for name, f in functions.items()}
    wall: dict[str, list[float]] = {name: [] for name in functions}
    cpu: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            began, used = time.perf_counter(), time.process_time()
            function(image)
            wall[name].append((time.perf_counter() - began) * 1e3)
            cpu[name].append((time.process_time() - used) * 1e3)
    return {
        name: {
            "ms": harness.median_interval(wall[name]),
            "times_ours": harness.paired_ratio(wall[name], wall[OURS]),
            "cpu_ms": statistics.median(cpu[name]),
            "max_pixel_difference": off[name],
            "samples_ms": [round(value, 3) for value in wall[name]],
        }
        for name in functions
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", str(arguments.threads))
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import torch

    torch.set_num_threads(arguments.threads)
    results, rows = [], []
    for height, width in SIZES:
        figures = measure(height, width, arguments.repeats)
        results.append({"height": height, "width": width, "implementations": figures})
        for name, row in figures.items():
            rows.append([
                f"{width}×{height} {name}",
                harness.interval_text(row["ms"], 1),
                harness.interval_text(row["times_ours"], 1),
                f"{row['cpu_ms']:.1f}",
                f"{row['max_pixel_difference']:.1e}",
            ])  # fmt: skip
    heads = ["size, implementation", "ms", "÷ ours", "CPU ms", "largest difference"]
    print(harness.table(heads, rows))
    if arguments.output is not None:
        document = harness.result(
            "preprocess", threads=arguments.threads, max_crops=CROPS, results=results
        )
        try:
            harness.write(document, arguments.output)
        except MolmoEdgeError as exc:
            sys.exit(f"error: {exc}")


if __name__ == "__main__":
    main()
