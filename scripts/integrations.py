"""Run the code of docs/integrations.md on the demo, and write what it shows into the page.

python scripts/integrations.py            # rewrite the outputs and docs/images
python scripts/integrations.py --check    # exit status 1 if one of them differs
"""

from __future__ import annotations

import ast
import base64
import contextlib
import difflib
import io
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PAGE, IMAGES = ROOT / "docs" / "integrations.md", ROOT / "docs" / "images"
SCENE = ROOT / "molmo_edge" / "bench" / "data" / "scene.png"
# A block of code and the beginning of its output; the output.
BLOCK = re.compile(r"(```python\n([^`]*)```\n\n```text\n)[^`]*")


def show(value: Any) -> None:
    """Print the text that a notebook shows of a cell's value, and save its image."""
    if value is not None:
        html = value._repr_html_()
        print(re.sub(r"<.*?>", "", html))
        for data in re.findall(r'base64,([^"]+)', html):
            Path("notebook.png").write_bytes(base64.b64decode(data))


def output(code: str) -> str:
    """Run a block as a notebook's cell, which shows the value of its last line."""
    *body, last = ast.parse(code).body
    scope: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(ast.Module(body, []), "cell", "exec"), scope)
        exec(compile(ast.Interactive([last]), "cell", "single"), scope)
    return printed.getvalue().rstrip() + "\n"


def equal(one: Path, other: Path) -> bool:
    """Whether two images are equal but for how versions of libraries smooth edges and text."""
    if not other.exists():
        return False
    first, second = (np.asarray(Image.open(path).convert("RGB"), float) for path in (one, other))
    return first.shape == second.shape and bool(np.abs(first - second).mean() < 0.5)


def main() -> int:
    check = "--check" in sys.argv
    os.environ["MPLBACKEND"] = "Agg"
    sys.displayhook = show
    old = PAGE.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
        shutil.copy(SCENE, ".")
        new = BLOCK.sub(lambda block: block[1] + output(block[2]), old)
        names = re.findall(r"\(images/(.*?)\)", old)
        images = [name for name in names if not equal(Path(name), IMAGES / name)]
        if not check:
            PAGE.write_text(new, encoding="utf-8")
            for name in images:
                shutil.copy(name, IMAGES)
    print(
        *difflib.unified_diff(old.splitlines(), new.splitlines(), "page", "now"), *images, sep="\n"
    )
    return int(check and (old != new or bool(images)))


if __name__ == "__main__":
    sys.exit(main())
