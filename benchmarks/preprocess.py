"""Preprocessing against TensorFlow's path and the plain yardstick, side by side in one run.

    python benchmarks/preprocess.py --output benchmarks/results/preprocess.json

The ways take turns on every repetition, so that whatever else the machine does falls on all of
them. A way's ratio is the median over repetitions of (its time / our time in the same repetition).
Also measured: CPU time of all threads, which other work on the machine disturbs less, the largest
difference of pixels, and what a fresh process's memory grows by.

Then JPEG files, from their bytes to patches: decoded whole, and with `jpeg_scale="reduced"`. The
difference of the two is told in grey levels of the scaled picture, padding left out. `--only jpeg`
does that alone.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import io
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
# Height, width, max_crops and how the file is written.
JPEGS = (
    (1080, 1920, 12, {}), (1080, 1920, 1, {}),
    (3000, 4000, 12, {}), (3000, 4000, 12, {"progressive": True}),
    (3000, 4000, 6, {}), (3000, 4000, 1, {}), (3001, 4001, 1, {}),
)  # fmt: skip
QUALITY = 90

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
        "molmo_edge, fast (uint8)": processor("fast"),
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


def photograph(height: int, width: int) -> np.ndarray:
    """Amplitudes falling with frequency as in photographs, and edges; (height, width, 3) uint8."""
    rng = np.random.default_rng(0)
    y, x = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    falloff = np.maximum(np.hypot(y, x), 1 / max(height, width))

    def field(power: float) -> np.ndarray:
        noise = np.fft.rfft2(rng.normal(size=(height, width)))
        values = np.fft.irfft2(noise / falloff**power, (height, width))
        return values / values.std()

    light, warm, green = field(1.0), field(1.5), field(1.5)
    levels = 120 + np.stack(
        [40 * light + 20 * warm, 40 * light - 10 * warm + 10 * green, 40 * light - 20 * green],
        axis=-1,
    )
    for _ in range(60):
        top, left = rng.integers(0, height), rng.integers(0, width)
        down, across = rng.integers(20, height // 4), rng.integers(20, width // 4)
        levels[top : top + down, left : left + across] += rng.normal(0, 50, 3)
    return np.clip(levels, 0, 255).astype(np.uint8)


def measure_jpeg(
    height: int, width: int, crops: int, options: dict[str, Any], repeats: int
) -> dict[str, Any]:
    """One file: milliseconds to decode and to preprocess it, whole and reduced; how both differ."""
    from PIL import Image

    from molmo_edge.images import load_for
    from molmo_edge.models.molmo.image_processor import STD, MolmoImageProcessor
    from molmo_edge.models.molmo.tiling import scaled_size

    stream = io.BytesIO()
    Image.fromarray(photograph(height, width)).save(stream, "JPEG", quality=QUALITY, **options)
    data = stream.getvalue()
    processor = MolmoImageProcessor(crops)
    needs = {"full": None, "reduced": lambda size: scaled_size(size, crops)}
    samples: dict[str, list[float]] = {name: [] for name in needs}
    decoding: dict[str, list[float]] = {name: [] for name in needs}
    decoded, made = {}, {}
    for _ in range(repeats + 1):
        for name, needed in needs.items():
            began = time.perf_counter()
            loaded = load_for(data, needed)
            middle = time.perf_counter()
            made[name] = processor.inputs(loaded.picture, loaded.size)
            samples[name].append((time.perf_counter() - began) * 1e3)
            decoding[name].append((middle - began) * 1e3)
            decoded[name] = loaded.picture.size
    apart = (made["reduced"].images - made["full"].images).numpy().reshape(-1, 3)
    levels = np.abs(apart[np.any(made["full"].images.numpy().reshape(-1, 3) != _padding(), -1)])
    levels = levels * np.float32(255) * np.asarray(STD, np.float32)
    return {
        "height": height,
        "width": width,
        "max_crops": crops,
        "options": {"quality": QUALITY, **options},
        "bytes": len(data),
        "needed": list(scaled_size((width, height), crops)),
        "decoded": {name: list(size) for name, size in decoded.items()},
        # The first of each is left out: it warms up.
        "ms": {name: spread(times[1:]) for name, times in samples.items()},
        "decode_ms": {name: statistics.median(times[1:]) for name, times in decoding.items()},
        "times_as_fast": statistics.median(
            a / b for a, b in zip(samples["full"][1:], samples["reduced"][1:], strict=True)
        ),
        "grey_levels_off": {"mean": float(levels.mean()), "max": float(levels.max())},
        "samples_ms": {name: [round(t, 3) for t in times[1:]] for name, times in samples.items()},
    }


def _padding() -> np.ndarray:
    from molmo_edge.models.molmo.image_processor import MEAN, STD

    return (-np.asarray(MEAN) / np.asarray(STD)).astype(np.float32)


def show_jpeg(row: dict[str, Any]) -> None:
    """Two lines about one file."""
    ms, off, decode = row["ms"], row["grey_levels_off"], row["decode_ms"]
    decoded, needed = row["decoded"]["reduced"], row["needed"]
    print(
        f"JPEG {row['width']} × {row['height']}, {row['max_crops']} crops, {row['options']}: "
        f"decoded as {decoded[0]} × {decoded[1]}, needed {needed[0]} × {needed[1]}\n"
        f"  full {ms['full']['median']:.1f} ms ({decode['full']:.1f} decoding), reduced "
        f"{ms['reduced']['median']:.1f} ms ({decode['reduced']:.1f}): {row['times_as_fast']:.1f} × "
        f"as fast; grey levels off: mean {off['mean']:.2f}, max {off['max']:.1f}"
    )


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
    parser.add_argument("--only", choices=("arrays", "jpeg"), help="one of the two parts")
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
    results, jpegs = [], []
    for height, width in SIZES if arguments.only != "jpeg" else ():
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
    for height, width, crops, how in JPEGS if arguments.only != "arrays" else ():
        jpegs.append(measure_jpeg(height, width, crops, how, arguments.repeats))
        show_jpeg(jpegs[-1])
    document = {
        "benchmark": "preprocess",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": ["python", "benchmarks/preprocess.py", *sys.argv[1:]],
        "max_crops": CROPS,
        "note": arguments.note,
        "environment": environment(arguments.threads),
        "results": results,
        "jpeg": jpegs,
    }
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
