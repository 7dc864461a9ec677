"""Creates, uses and closes an engine again and again in one process: does its memory come back?

    python benchmarks/lives.py --lives 10

Prints the process's resident memory after each close; JSON goes to benchmarks/results. The first
life also loads libraries and warms allocators, so growth is counted from the end of the second.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from molmo_edge import EdgeVLM

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lives", type=int, default=10)
    parser.add_argument("--model", default="stub")
    parser.add_argument("--cache-dir", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=None)
    asked = parser.parse_args()
    picture = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    process = psutil.Process()
    rss_mib, open_mib, seconds = [], [], []
    environment: dict[str, Any] = {}
    for life in range(1, asked.lives + 1):
        began = time.perf_counter()
        with EdgeVLM(
            asked.model,
            cache_dir=asked.cache_dir,
            max_model_len=2048,
            kv_cache_memory_gb=0.25,
            enforce_eager=True,
        ) as vlm:
            vlm.query(picture, "What is this?", max_crops=1)
            environment = dict(vlm.environment)
            open_mib.append(process.memory_info().rss / 2**20)
        del vlm
        gc.collect()
        rss_mib.append(process.memory_info().rss / 2**20)
        seconds.append(time.perf_counter() - began)
        print(
            f"life {life}: {seconds[-1]:.1f} s, RSS open {open_mib[-1]:.0f} MiB, "
            f"closed {rss_mib[-1]:.0f} MiB",
            flush=True,
        )
    grown = rss_mib[-1] - rss_mib[1] if len(rss_mib) > 2 else None
    if grown is not None:
        print(f"RSS growth from the second life to the last: {grown:.1f} MiB")
    name = f"{time.strftime('%Y-%m-%d')}-lives-{asked.model.split('/')[-1]}.json"
    out = asked.out or RESULTS / name
    out.write_text(
        json.dumps(
            {
                "kind": "lives",
                "environment": environment,
                "rss_open_mib": open_mib,
                "rss_closed_mib": rss_mib,
                "seconds": seconds,
                "growth_mib_from_second_life": grown,
            },
            indent=2,
        )
        + "\n",
        encoding="utf-8",
    )
    print(f"Written to {out.name}.")


if __name__ == "__main__":
    main()
