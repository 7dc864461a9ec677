"""Locate an object in space: label → point → pixel → metres in the camera's frame.

    python examples/pick_a_point.py colour.png depth.png "the red mug" --model allenai/Molmo2-4B \\
        --fx 615.3 --fy 615.6 --cx 320.5 --cy 241.2

The built-in demo knows drawn shapes; this is a drawing that hangs 80 cm in front of the camera:

    python -c "import numpy; numpy.save('depth.npy', numpy.full((320, 480), 0.8))"
    python examples/pick_a_point.py molmo_edge/bench/data/scene.png depth.npy "yellow star" \\
        --fx 400 --fy 400 --cx 240 --cy 160

The depth image must be aligned with the colour image: 16-bit PNG in millimetres, or .npy in metres,
0 or NaN where unknown. Axes are those of the optical frame: x right, y down, z forward.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from molmo_edge import EdgeVLM
from molmo_edge.engine.fake import FakeEngine


def read_depth(path: Path) -> np.ndarray:
    """Read depth in metres, H x W float, NaN where unknown."""
    if path.suffix == ".npy":
        metres = np.load(path).astype(float)
    else:
        with Image.open(path) as image:
            metres = np.asarray(image).astype(float) / 1000.0
    return np.where(metres > 0, metres, np.nan)


def depth_at(depth: np.ndarray, column: int, row: int, radius: int = 3) -> float:
    """Median depth around a pixel: a single value is often missing, or on an edge."""
    rows = slice(max(0, row - radius), row + radius + 1)
    columns = slice(max(0, column - radius), column + radius + 1)
    window = depth[rows, columns]
    return float(np.nanmedian(window)) if np.isfinite(window).any() else float("nan")


def deproject(
    column: int, row: int, z: float, fx: float, fy: float, cx: float, cy: float
) -> tuple[float, float, float]:
    """Return metres in the optical frame, by the pinhole model without distortion."""
    # A point is at the centre of its pixel.
    return (column + 0.5 - cx) * z / fx, (row + 0.5 - cy) * z / fy, z


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image", type=Path)
    parser.add_argument("depth", type=Path)
    parser.add_argument("label")
    for name in ("fx", "fy", "cx", "cy"):
        parser.add_argument(f"--{name}", type=float, required=True, help="pixels")
    parser.add_argument("--model", help="default: from the settings, else the built-in demo")
    parser.add_argument("--fake", action="store_true", help="point at the centre, no model")
    args = parser.parse_args()

    engine = FakeEngine.factory('<point x="50.0" y="50.0">it</point>') if args.fake else None
    with EdgeVLM(args.model, engine=engine) as vlm:
        answer = vlm.point(args.image, args.label)
        upright = answer.image  # EXIF rotation applied; points refer to it
    depth = read_depth(args.depth)
    if depth.shape != (upright.height, upright.width):
        sys.exit(
            f"The depth image is {depth.shape[1]} x {depth.shape[0]}, the colour image "
            f"{upright.width} x {upright.height}; align them."
        )
    if not answer.points:
        sys.exit(f"No points; the answer is: {answer.text}")
    for point in answer.points:
        column, row = point.px(upright.size)
        z = depth_at(depth, column, row)
        if np.isnan(z):
            print(f"pixel ({column}, {row}): depth unknown")
            continue
        x, y, z = deproject(column, row, z, args.fx, args.fy, args.cx, args.cy)
        print(f"pixel ({column}, {row}): x {x:+.3f} m, y {y:+.3f} m, z {z:.3f} m")


if __name__ == "__main__":
    main()
