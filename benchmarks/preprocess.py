"""Preprocessing of images and frames against plain paths, in turns.

    python benchmarks/preprocess.py --output benchmarks/results/preprocess-cpu.json

Molmo 1: the reference implementation, and TensorFlow's path where it is installed. Molmo 2: torch's
resize and numpy's reshapes, as AllenAI's molmo2 code has them. All take turns on every repetition,
ours twice (the noise floor), so that whatever else the machine does affects all of them. A ratio is
the median over repetitions of their time over ours in the same repetition. Also measured: CPU time
of all threads and the largest difference of pixels.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np

from molmo_edge.bench.tables import table

SIZES = ((480, 640), (1080, 1920), (3000, 4000))
CROPS = 12
# Of Molmo 2: images, and clips of that many frames.
MOLMO2_SIZES = ((480, 640, 0), (1080, 1920, 0), (480, 640, 16))
MOLMO2_CROPS = 8
OURS = "molmo_edge"
AGAIN = "molmo_edge again"

# From nothing to patches, float32.
Implementation = Callable[[], np.ndarray]


def make_image(height: int, width: int) -> np.ndarray:
    """Smooth shapes with noise, (height, width, 3) uint8."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    waves = [127 + 100 * np.sin(x / a + y / b) for a, b in ((7, 11), (19, 31), (45, 5))]
    noise = np.random.default_rng(0).normal(0, 20, (height, width, 3))
    return np.clip(np.stack(waves, axis=-1) + noise, 0, 255).astype(np.uint8)


def molmo(image: np.ndarray) -> dict[str, Implementation]:
    """Molmo 1's patches of an image."""
    from molmo_edge.models.molmo.image_processor import MolmoImageProcessor
    from molmo_edge.models.molmo.prompts import ImageTokenIds
    from molmo_edge.reference import molmo_inputs

    special = ImageTokenIds(1, 2, 3, 4)
    ours = MolmoImageProcessor(CROPS, "torch")
    out: dict[str, Implementation] = {
        OURS: lambda: ours.inputs(image).images.numpy(),
        "reference": lambda: molmo_inputs.preprocess(image, special, CROPS).images,
    }
    if importlib.util.find_spec("tensorflow") is not None:
        trained = MolmoImageProcessor(CROPS, "tensorflow")
        out["tensorflow"] = lambda: trained.inputs(image).images.numpy()
    return out


def molmo2(image: np.ndarray, n_frames: int) -> dict[str, Implementation]:
    """Molmo 2's patches of an image, or of a clip of `n_frames` in which it moves."""
    from molmo_edge.models.molmo2.image_processor import frame_patches, image_patches
    from molmo_edge.models.molmo2.tiling import Geometry

    geometry = Geometry()
    if n_frames:
        frames = [np.roll(image, 11 * i, axis=1) for i in range(n_frames)]
        return {
            OURS: lambda: frame_patches(frames, geometry).numpy(),
            "plain": lambda: plain([resize(f, 378, 378)[None, None] for f in frames]),
        }
    tiling = geometry.tiling(*image.shape[:2], MOLMO2_CROPS)
    rows, cols = tiling.rows, tiling.cols

    def crops() -> np.ndarray:
        scaled = resize(image, rows * 266 + 112, cols * 266 + 112)
        tiles = np.empty((rows, cols, 378, 378, 3), np.uint8)
        for row in range(rows):
            for col in range(cols):
                y, x = row * 266, col * 266
                tiles[row, col] = scaled[y : y + 378, x : x + 378]
        return plain([resize(image, 378, 378)[None, None], tiles])

    return {OURS: lambda: image_patches(image, tiling).numpy(), "plain": crops}


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear without antialias, (height, width, 3) uint8."""
    import torch
    from torch.nn.functional import interpolate

    source = torch.from_numpy(image).permute(2, 0, 1).unsqueeze(0).to(torch.float32)
    scaled = interpolate(source, (height, width), mode="bilinear", align_corners=False)
    return scaled[0].round().to(torch.uint8).permute(1, 2, 0).numpy()


def plain(views: list[np.ndarray]) -> np.ndarray:
    """Views of rows × cols crops, (rows, cols, 378, 378, 3) uint8 each, to normalised patches."""
    crops = np.concatenate([view.reshape(-1, 378, 378, 3) for view in views])
    values = (crops.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    patches = values.reshape(-1, 27, 14, 27, 14, 3).transpose(0, 1, 3, 2, 4, 5)
    return patches.reshape(-1, 729, 588)


def measure(functions: dict[str, Implementation], repeats: int) -> dict[str, Any]:
    """One case: milliseconds of every implementation, ratios to ours, pixel differences."""
    import torch

    # With more threads torch adds in another order, and rounds a few ties in a million otherwise.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = list(functions.values())[1]()
    off = {name: float(np.abs(f() - expected).max()) for name, f in functions.items()}
    torch.set_num_threads(threads)
    functions, off = {**functions, AGAIN: functions[OURS]}, {**off, AGAIN: off[OURS]}
    wall: dict[str, list[float]] = {name: [] for name in functions}
    cpu: dict[str, list[float]] = {name: [] for name in functions}
    shuffled = random.Random(0)
    for _ in range(repeats):
        # In any order: what ran before has left its memory warm, or not.
        for name in shuffled.sample(list(functions), len(functions)):
            began, used = time.perf_counter(), time.process_time()
            functions[name]()
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
    cases = {f"Molmo 1, {w}×{h}": molmo(make_image(h, w)) for h, w in SIZES}
    for h, w, n_frames in MOLMO2_SIZES:
        clip = f", {n_frames} frames" if n_frames else ""
        cases[f"Molmo 2, {w}×{h}{clip}"] = molmo2(make_image(h, w), n_frames)
    results, rows = [], []
    for case, functions in cases.items():
        figures = measure(functions, arguments.repeats)
        results.append({"case": case, "implementations": figures})
        for name, row in figures.items():
            rows.append([
                f"{case}: {name}",
                harness.interval_text(row["ms"], 1),
                harness.interval_text(row["times_ours"], 1),
                f"{row['cpu_ms']:.1f}",
                f"{row['max_pixel_difference']:.1e}",
            ])  # fmt: skip
    heads = ["implementation", "ms", "÷ ours", "CPU ms", "largest difference"]
    print(table(heads, rows))
    settings = {"max_crops": CROPS, "molmo2_max_crops": MOLMO2_CROPS}
    document = harness.result("preprocess", threads=arguments.threads, **settings, results=results)
    harness.write(document, arguments.output)


if __name__ == "__main__":
    harness.start(main)
