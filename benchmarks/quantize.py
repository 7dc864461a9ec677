"""Quantised copies of a checkpoint: bytes, accuracy on drawn scenes, drift from the original.

Also an FP8 KV cache under the original. A CPU has no fast kernels for quantised weights: there the
copies are unpacked, so that the weights are those stored and computing is the original's.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import figures
import harness
import numpy as np
from PIL import Image
from safetensors.torch import load_file, save_file

from molmo_edge.bench import accuracy, drift
from molmo_edge.bench.cases import Case
from molmo_edge.bench.environment import Target, detected_device
from molmo_edge.bench.scenes import random_scene
from molmo_edge.checkpoint_files import tensors
from molmo_edge.devices.shapes import part_of
from molmo_edge.engine.vllm_args import cache_root
from molmo_edge.errors import ConfigError, EngineStartError
from molmo_edge.models.hub import locate
from molmo_edge.quantize import quantize
from molmo_edge.quantize.formats import FORMATS, HEADS, unpack
from molmo_edge.settings import resolve

COPIES = {
    "fp8": ("fp8", "none", False),
    "fp8, head fp8": ("fp8", "fp8", False),
    "w4a16": ("w4a16", "none", False),
    "w4a16, calibrated": ("w4a16", "none", True),
    "w4a16, head fp8, calibrated": ("w4a16", "fp8", True),
    "w4a16, head w8a16, calibrated": ("w4a16", "w8a16", True),
    "w4a16, head w4a16, calibrated": ("w4a16", "w4a16", True),
    "nvfp4": ("nvfp4", "none", False),
    "nvfp4, calibrated": ("nvfp4", "none", True),
    "nvfp4, head fp8, calibrated": ("nvfp4", "fp8", True),
}
"""Scheme, LM head, and whether to calibrate them with drawn scenes."""
CALIBRATION_SCENES, DRIFT_SCENES = 16, 8
MAX_TOKENS = 128


def unpacked(original: Path, copy: Path, scheme: str, head: str) -> Path:
    """An unquantised checkpoint, beside the copy, with the values of its weights."""
    out = copy.with_name(f"{copy.name}, unpacked")
    shutil.copytree(original, out)
    for path in copy.glob("*.safetensors"):
        stored = load_file(path)
        for layer in [n.removesuffix(".weight_scale") for n in stored if "weight_scale" in n]:
            names = [n for n in stored if n.startswith(f"{layer}.weight")]
            parts = {name.removeprefix(f"{layer}."): stored.pop(name) for name in names}
            form = FORMATS[scheme] if part_of(layer + ".") == "blocks" else HEADS[head]
            assert form is not None
            stored[f"{layer}.weight"] = unpack(parts, form)
        save_file(stored, out / path.name, metadata={"format": "pt"})
    return out


def draw(number: int) -> Image.Image:
    """A scene with shapes, of neither the training nor the evaluation."""
    rng = np.random.default_rng((accuracy.HELD_OUT + 1, number))
    return random_scene(rng, count=1 + number % 8).draw()


def run(original: Path, work: Path, scenes: int) -> list[dict[str, Any]]:
    """A row for the original, each copy, and an FP8 KV cache."""
    images = work / "images"
    images.mkdir()
    for number in range(CALIBRATION_SCENES):
        draw(number).save(images / f"{number}.png")
    total = sum(tensor.nbytes for tensor in tensors(original))
    targets = {"original": (Target(str(original)), total)}
    for name, (scheme, head, calibrate) in COPIES.items():
        harness.progress(f"quantising: {name}")
        seen = images if calibrate else None
        made = quantize(original, work / name, scheme, head=head, calibrate=seen)
        directory = made.directory
        if detected_device().kind == "cpu":
            directory = unpacked(original, directory, scheme, head)
        targets[name] = Target(str(directory)), made.out_bytes
    targets["FP8 KV cache"] = Target(str(original), options={"kv_cache_dtype": "fp8"}), total
    cases = [
        Case(f"{number}", question, question, draw(CALIBRATION_SCENES + number))
        for number in range(DRIFT_SCENES)
        for question in ("Point to the shapes.", "Describe this image.")
    ]
    rows, known = [], []
    for name, (target, size) in targets.items():
        row: dict[str, Any] = {"name": name, "bytes": size, "error": None}
        try:
            with target.open(True) as vlm:
                asked = accuracy.questions(scenes, 0)
                measured = accuracy.evaluate(vlm, name, asked, lambda _: None)
                row["dtype"] = measured.environment.model.dtype
                # Not the environment: its model is a directory of this machine.
                row["accuracy"] = measured.model_dump(exclude={"environment", "mistakes"})
                if name == "original":
                    known = drift.answer_all(vlm, cases, max_tokens=MAX_TOKENS)
                else:
                    row["drift"] = drift.compare(vlm, name, known, MAX_TOKENS).model_dump()
        except (ConfigError, EngineStartError) as exc:
            row["error"] = str(exc)  # such as a device without the kernels
        rows.append(row)
        harness.progress(f"{name}: {row['error'] or 'measured'}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo", help="checkpoint directory, hub name, or demo")
    parser.add_argument("--scenes", type=int, default=200, help="scenes to ask about")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="molmo-edge-quantised-") as work:
        original = locate(given.model, cache_root(resolve({}).settings))
        rows = run(original, Path(work), given.scenes)
    print(figures.quantised_table(rows))
    settings = {"model": given.model, "scenes": given.scenes}
    harness.write(harness.result("quantised", settings=settings, rows=rows), given.output)


if __name__ == "__main__":
    harness.start(main)
