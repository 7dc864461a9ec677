"""Quantising a checkpoint: speed, memory, errors; then decode speed and drift of what came out.

Seeded checkpoints with made-up weights are written: in float32 with few blocks of the tower, which
no engine loads, and in bfloat16 with all. Each way of quantising runs in a process of its own; what
has a kernel on a CPU is then opened in the engine beside the original, as `bench drift` does.
In all of them one norm channel in 64 is eight times as loud, as in trained models.

    python benchmarks/quantize.py --output benchmarks/results/quantize.json
    python benchmarks/quantize.py --model FOLDER --pictures FOLDER     # a checkpoint of your own
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from molmo_edge.errors import BenchmarkError

WAYS = ("fp8", "w4a16", "w4a16 unsearched", "w4a16 calibrated",
        "nvfp4", "nvfp4 unsearched", "nvfp4 calibrated")  # fmt: skip
"""Scheme, and whether the scales are searched (the default), not, or weighted by pictures."""

# label → way, variables of vLLM's. With AMX, vLLM's default for 4 bits is int8 activations.
ENGINES = {
    "fp8": ("fp8", {}),
    "w4a16": ("w4a16", {}),
    "w4a16 calibrated": ("w4a16 calibrated", {}),
    "w4a16, bfloat16 activations": ("w4a16", {"VLLM_CPU_INT4_W4A8": "0"}),
    "w4a16 calibrated, bfloat16 activations": ("w4a16 calibrated", {"VLLM_CPU_INT4_W4A8": "0"}),
}
# torch's FP8 product on a CPU is an emulation on one thread: minutes for an engine's start at the
# width of the others. It gets a checkpoint of width 256 and two layers, and short text alone.
EMULATED = "fp8"
LOUD, EVERY = 8.0, 64
# A large checkpoint comes out in many files; a small one only if they are small.
FILE_BYTES = 32 << 20
LIMIT_S = 3600.0


def write_made_up(folder: Path, *, layers: int, vit_blocks: int, dtype: str) -> Path:
    """A checkpoint of width 1024 with loud channels; 61 MB a layer in float32."""
    import torch

    from molmo_edge.models.molmo.synthetic import Shape, random_weights, write_checkpoint

    plain = random_weights(0)

    def weights(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        made = plain(name, shape)
        if name.endswith(("attn_norm.weight", "ff_norm.weight")):
            made[::EVERY] *= LOUD
        return made

    shape = Shape(hidden_size=1024, layers=layers, heads=8, kv_heads=2, mlp=4096,
                  embedding_size=2048, vit_blocks=vit_blocks)  # fmt: skip
    return write_checkpoint(folder, shape=shape, weights=weights, dtype=getattr(torch, dtype))


def write_pictures(folder: Path) -> Path:
    """Six seeded pictures of different shapes."""
    from PIL import Image

    from molmo_edge.reference.verify import picture

    folder.mkdir()
    sizes = ((90, 120), (240, 320), (320, 240), (336, 336), (200, 600), (480, 640))
    for seed, (height, width) in enumerate(sizes):
        Image.fromarray(picture(height, width, 100 + seed)).save(folder / f"{seed}.png")
    return folder


def child(settings: dict[str, Any]) -> None:
    """Quantises once and prints what it took, a line of JSON."""
    import torch

    from molmo_edge.quantize import formats as quant_formats
    from molmo_edge.quantize import plan as quant_plan
    from molmo_edge.quantize.run import quantize

    scheme, _, mode = settings["way"].partition(" ")
    more: dict[str, Any] = {}
    if mode == "unsearched":
        form = dataclasses.replace(quant_formats.FORMATS[scheme], search=(1.0,))
        quant_formats.FORMATS = {**quant_formats.FORMATS, scheme: form}
    elif mode == "calibrated":
        more["calibrate"] = settings["pictures"]
    quant_plan.SHARD_BYTES = FILE_BYTES
    # Imports and thread pools are not what is measured.
    quant_formats.pack(torch.randn(256, 256), quant_formats.FORMATS[scheme])
    with _peaks() as peaks:
        done = quantize(settings["model"], settings["out"], scheme, **more)
    errors = done.relative_errors
    print(json.dumps({
        "seconds": done.seconds,
        "in_bytes": done.in_bytes,
        "out_bytes": done.out_bytes,
        "out_over_in": done.out_bytes / done.in_bytes,
        "mb_per_s": done.in_bytes / 1e6 / done.seconds,
        **peaks,
        "mean_relative_error": statistics.fmean(errors.values()),
        "worst_relative_error": max(errors.values()),
        "worst_layer": max(errors, key=lambda name: errors[name]),
    }), flush=True)  # fmt: skip


@contextmanager
def _peaks() -> Iterator[dict[str, int]]:
    """Largest growth of memory meanwhile, looked at every 5 ms.

    Resident pages of the mapped original count as well; the system takes them back when it needs
    them. Anonymous pages are what has to be there.
    """
    names = {"peak_growth_bytes": "VmRSS", "peak_anonymous_growth_bytes": "RssAnon"}

    def now() -> dict[str, int]:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        found = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith(" kB")}
        return {key: int(found[name]) * 1024 for key, name in names.items()}

    before, peaks, over = now(), dict.fromkeys(names, 0), threading.Event()

    def look() -> None:
        while not over.wait(0.005):
            found = now()
            peaks.update({key: max(peaks[key], found[key] - before[key]) for key in names})

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield peaks
    finally:
        over.set()
        watcher.join()


def quantised(model: Path, out: Path, way: str, pictures: Path) -> dict[str, Any]:
    """One way in a fresh process."""
    told = {"model": str(model), "out": str(out), "way": way, "pictures": str(pictures)}
    command = [sys.executable, __file__, "--child", json.dumps(told)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    if done.returncode != 0:
        raise BenchmarkError(f"{way} failed:\n{done.stderr[-2000:]}")
    report: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{way}: {report['seconds']:.1f} s", file=sys.stderr)
    return report


def in_engine(
    original: Path, folders: dict[str, Path], labels: list[str], tokens: int, pictures: bool
) -> dict[str, Any]:
    """Decode speed and drift of each against the original, in bfloat16."""
    from molmo_edge.bench.command import Target

    from molmo_edge.bench import drift, drift_run
    from molmo_edge.bench.cases import Case

    options = {"dtype": "bfloat16", "max_model_len": 2048, "max_num_seqs": 1,
               "kv_cache_memory_gb": 0.25}  # fmt: skip
    chosen = [("original", Target(str(original), None, options))]
    chosen += [(label, Target(str(folders[ENGINES[label][0]]), None, options)) for label in labels]
    if len(chosen) == 1:
        return {}
    upcoming = iter([label for label, _ in chosen])
    speeds: dict[str, list[float]] = {}

    @contextmanager
    def opened(target: Target) -> Iterator[Any]:
        label = next(upcoming)
        with _variables(ENGINES.get(label, ("", {}))[1]), target.open(True) as vlm:
            count, repeats = (64, 6) if pictures else (8, 4)
            runs = [
                vlm.query(None, f"Story {i}.", max_tokens=count, ignore_eos=True).metrics.output_tps
                for i in range(repeats)
            ]
            speeds[label] = runs[1:]
            yield vlm

    cases = [Case("text", "Text", "Write a short story about a robot.", None)]
    shown = drift.prompts()
    for case in (shown[0], shown[4]) if pictures else ():
        if case.image is not None:
            small = case.image.resize((200, 150))
            cases.append(dataclasses.replace(case, image=small, max_crops=1))
    document = drift_run.run(chosen, cases, max_tokens=tokens, bounds=drift.Bounds(), opened=opened)
    found: dict[str, Any] = {"original": {"decode_tps": speeds["original"]}}
    for one in document.drifts:
        found[one.other] = {
            "decode_tps": speeds[one.other],
            "decode_over_original": statistics.median(speeds[one.other])
            / statistics.median(speeds["original"]),
            "tokens": sum(case.tokens for case in one.cases),
            **one.model_dump(
                include={"equal_greedy", "mean_abs_dlogprob", "max_abs_dlogprob", "mean_kl"}
            ),
        }
    return found


@contextmanager
def _variables(given: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for name, text in before.items():
            if text is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = text


def table(document: dict[str, Any]) -> str:
    """Markdown."""
    parts = document["quantising"]
    lines = ["| | s | MB/s | out/in | peak MB | anonymous | mean error | worst |", "|---" * 8 + "|"]
    for part, ways in parts.items():
        for way, r in ways.items():
            lines.append(
                f"| {part}, {way} | {r['seconds']:.1f} | {r['mb_per_s']:.0f} | "
                f"{r['out_over_in']:.3f} | {r['peak_growth_bytes'] / 1e6:.0f} | "
                f"{r['peak_anonymous_growth_bytes'] / 1e6:.0f} | {r['mean_relative_error']:.4f} | "
                f"{r['worst_relative_error']:.4f} |"
            )
    lines += ["", "| | tok/s | × | equal greedy | mean dlp | max dlp | KL |", "|---" * 7 + "|"]
    engines = [
        (f"{kind}: {label}", r)
        for kind, found in document.get("engines", {}).items()
        for label, r in found.items()
    ]
    for label, r in engines:
        speed = f"| {label} | {statistics.median(r['decode_tps']):.1f} | "
        if "mean_kl" in r:
            speed += (
                f"{r['decode_over_original']:.2f} | {r['equal_greedy']:.1%} | "
                f"{r['mean_abs_dlogprob']:.3f} | {r['max_abs_dlogprob']:.2f} | {r['mean_kl']:.4f} |"
            )
        lines.append(speed)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, help="checkpoint folder instead of the made-up ones")
    parser.add_argument("--pictures", type=Path, help="folder for calibrating; else made up")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8],
                        help="of the checkpoints that no engine loads")  # fmt: skip
    parser.add_argument("--tokens", type=int, default=16, help="scored a prompt")
    parser.add_argument("--no-engine", action="store_true")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(json.loads(options.child))
        return
    document: dict[str, Any] = {
        "benchmark": "quantize",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "load_average": list(os.getloadavg()),
        "file_bytes": FILE_BYTES,
        "quantising": {},
    }
    with tempfile.TemporaryDirectory(prefix="molmo-edge-quantize-") as name:
        root = Path(name)
        pictures = options.pictures or write_pictures(root / "pictures")
        if options.model is None:
            for layers in options.layers:
                streaming = write_made_up(
                    root / f"{layers}", layers=layers, vit_blocks=9, dtype="float32"
                )
                # The larger ones are there to show that memory does not grow with them.
                chosen = options.ways if layers == options.layers[0] else options.ways[:2]
                document["quantising"][f"float32, {layers} layers"] = {
                    way: quantised(streaming, root / f"{layers} {way}", way, pictures)
                    for way in chosen
                }
        model = options.model or write_made_up(
            root / "original", layers=4, vit_blocks=23, dtype="bfloat16"
        )
        folders = {way: root / f"e{i}" for i, way in enumerate(options.ways)}
        needed = {way for way, _ in ENGINES.values()} & folders.keys()
        name = "bfloat16, 4 layers" if options.model is None else model.name
        document["quantising"][name] = {
            way: quantised(model, folders[way], way, pictures)
            for way in options.ways
            if way in needed or options.model is not None
        }
        if not options.no_engine:
            labels = [label for label, (way, _) in ENGINES.items() if way in folders]
            fast = [label for label in labels if label != EMULATED]
            found = {"width 1024": in_engine(model, folders, fast, options.tokens, True)}
            if EMULATED in labels:
                from molmo_edge.models.molmo.synthetic import write_checkpoint

                tiny = write_checkpoint(root / "tiny")
                folders = {EMULATED: root / "tiny fp8"}
                quantised(tiny, folders[EMULATED], EMULATED, pictures)
                found["width 256"] = in_engine(tiny, folders, [EMULATED], 8, False)
            document["engines"] = found
    print(table(document))
    from molmo_edge.bench.environment import device_of, versions
    from molmo_edge.devices.detect import detect

    document["environment"] = {
        "software": versions().model_dump(),
        "device": device_of(detect()).model_dump(),
    }
    if options.output is not None:
        write_text(json.dumps(document, indent=1) + "\n", options.output)


def _command() -> list[str]:
    """As typed, folders by their names alone."""
    said = [Path(text).name if text.startswith(("/", "~")) else text for text in sys.argv[1:]]
    return ["python", "benchmarks/quantize.py", *said]


if __name__ == "__main__":
    main()
