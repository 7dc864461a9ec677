"""Write a quantised copy of a checkpoint.

Tensors of the original are read one at a time and stored in compressed-tensors formats; the vision
tower, the embeddings and the LM head become bfloat16.
"""

from __future__ import annotations

import fcntl
import glob
import importlib.util
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molmo_edge._version import __version__
from molmo_edge.errors import MissingDependencyError, QuantizeError
from molmo_edge.quantize.formats import Format, format_of, pack
from molmo_edge.quantize.plan import IGNORED, Job, Tensor, plan

if TYPE_CHECKING:
    from molmo_edge.quantize.calibrate import Calibration

Progress = Callable[[int, int, str], None]
"""Called with the bytes of the original done, the bytes in all, and the tensor just finished."""

_SPARE_BYTES = 64 << 20
# Everything of the original but weights and code is copied.
_DATA_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")
_OWN = frozenset({"config.json", "model.safetensors.index.json"})


@dataclass(frozen=True)
class Quantized:
    """Result of `quantize`.

    Attributes:
        folder: directory of the new checkpoint.
        relative_errors: layer → Frobenius norm of (stored - original) over that of the original;
            after calibration, each column is weighted with the mean square of its inputs.
        in_bytes, out_bytes: of all weights.
        pictures: number of calibration images.
    """

    folder: Path
    scheme: str
    relative_errors: dict[str, float]
    in_bytes: int
    out_bytes: int
    seconds: float
    pictures: int = 0


def quantize(
    model_folder: str | Path,
    out_folder: str | Path,
    scheme: str,
    *,
    calibrate: str | Path | None = None,
    progress: Progress | None = None,
) -> Quantized:
    """Write a quantised copy of a Molmo 1 checkpoint; needs no GPU.

    Linear layers of the language model are stored as `scheme` says (``"fp8"``, ``"w4a16"`` or
    ``"nvfp4"``), rounded to nearest with the scale of each group searched for the least squared
    error; everything else becomes bfloat16. Memory holds one output file (512 MiB, or a single
    larger tensor) and one tensor of the original at a time.

    `calibrate` is a directory of typical images (JPEG, PNG, WebP or BMP; up to 16 are used), for
    the 4-bit schemes. The model processes them in float32 on the CPU with the weights of one block
    in memory at a time. Columns with large inputs are then scaled up before rounding, which the
    layer or norm before compensates exactly, and squared errors are weighted with the mean square
    of a column's inputs.

    The output appears under its name only when it is complete. A killed run may leave a hidden
    directory ``.<out_folder>.quantize-*`` beside it, which the next run deletes.

    Raises:
        QuantizeError: unknown scheme, output exists, not enough disk space, a checkpoint that is
            quantised already, lacks tensors, or contains NaN or infinity; no images in
            `calibrate`, an unreadable one, or a scheme that gains nothing from calibration.
        ModelError: no readable Molmo 1 checkpoint.
        MissingDependencyError: compressed-tensors, a dependency of vLLM, is not installed.
    """
    began = time.monotonic()
    form = format_of(scheme)
    if importlib.util.find_spec("compressed_tensors") is None:
        raise MissingDependencyError(
            'Quantising needs compressed-tensors, which comes with vLLM: pip install '
            '"molmo-edge[cuda]" or "molmo-edge[cpu]".'
        )
    source = Path(model_folder).expanduser().absolute()
    out = Path(out_folder).expanduser().absolute()
    if out.exists() or out.is_symlink():
        raise QuantizeError(f"'{out}' exists already. Give another output, or remove it.")
    if not out.parent.is_dir():
        raise QuantizeError(f"'{out.parent}' is not a directory. Create it first.")
    job = plan(source, form)
    images = [] if calibrate is None else _images(Path(calibrate).expanduser(), form)
    # Calibration reads the quantised layers once more.
    extra = sum(t.in_bytes for t in job.tensors if t.packed) if images else 0

    def report(done: int, name: str) -> None:
        if progress is not None:
            progress(done, job.in_bytes + extra, name)

    def report_block(done: int, count: int) -> None:
        report(extra * done // count, f"Calibrated block {done} of {count}")

    try:
        _remove_stale(out)
        check_disk(out.parent, job)
        with _work_directory(out) as work:
            calibration: Calibration | None = None
            if images:
                from molmo_edge.quantize.calibrate import calibrate as run_calibration

                report(0, f"Reading {len(images)} images")
                calibration = run_calibration(source, job, form, images, report_block)
            errors: dict[str, float] = {}
            done = extra
            for index, shard in enumerate(job.shards):
                stored: dict[str, Any] = {}
                for tensor in shard:
                    stored |= _stored(source, tensor, form, calibration, errors)
                    done += tensor.in_bytes
                    report(done, tensor.name)
                save(work / job.file(index), stored)
            out_bytes = finish(source, work, job, form, errors, len(images))
            work.rename(out)
    except OSError as exc:
        raise QuantizeError(
            f"'{out}' cannot be written ({exc.strerror or type(exc).__name__})."
        ) from exc
    seconds = time.monotonic() - began
    return Quantized(out, scheme, errors, job.in_bytes, out_bytes, seconds, len(images))


def _remove_stale(out: Path) -> None:
    """Delete the work directories of killed runs with the same output."""
    for left in out.parent.glob(f".{glob.escape(out.name)}.quantize-*"):
        if (lock := _lock(left)) is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)


@contextmanager
def _work_directory(out: Path) -> Iterator[Path]:
    """A directory named as `out` inside a hidden one beside it, which is removed at the end."""
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.quantize-", dir=out.parent) as name:
        lock = _lock(Path(name))
        try:
            work = Path(name) / out.name
            work.mkdir()
            yield work
        finally:
            if lock is not None:
                os.close(lock)


def _lock(directory: Path) -> int | None:
    """A descriptor that locks `directory`; None if another run holds it. Ends with the process."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _images(directory: Path, form: Format) -> list[Path]:
    from molmo_edge.quantize.calibrate import image_files

    if form.bits != 4:
        raise QuantizeError(
            f"Calibration gains nothing in {form.scheme}: its values are rounded relative to their "
            "own size, whatever their column's scale. Leave it out, or use w4a16 or nvfp4."
        )
    return image_files(directory)


def _stored(
    source: Path,
    tensor: Tensor,
    form: Format,
    calibration: Calibration | None,
    errors: dict[str, float],
) -> dict[str, Any]:
    """The output's tensors for one of the original; adds a packed layer's error to `errors`."""
    import torch
    from safetensors import safe_open

    with safe_open(source / tensor.file, framework="pt") as opened:
        value = opened.get_tensor(tensor.name)
    if calibration is not None:
        value = calibration.apply(tensor.name, value)
    if not tensor.packed:
        return {tensor.name: value.to(torch.bfloat16)}
    layer = tensor.name.removesuffix(".weight")
    try:
        packed = pack(value, form, None if calibration is None else calibration.importance(layer))
    except QuantizeError as exc:
        raise QuantizeError(f"'{tensor.name}' cannot be quantised: {exc}.") from None
    errors[layer] = packed.relative_error
    return {f"{layer}.{suffix}": part for suffix, part in packed.tensors.items()}


def check_disk(directory: Path, job: Job) -> None:
    needed = _SPARE_BYTES + job.out_bytes
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise QuantizeError(
            f"The output needs {needed / 1e9:.1f} GB, but '{directory}' has {free / 1e9:.1f} GB "
            "free."
        )


def save(path: Path, tensors: dict[str, Any]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as exc:
        raise OSError(str(exc)) from exc


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def finish(
    source: Path, work: Path, job: Job, form: Format, errors: dict[str, float], images: int
) -> int:
    """Write everything but the weights; returns the bytes of all weight files."""
    from safetensors import safe_open

    weight_map: dict[str, str] = {}
    total = 0
    for index in range(len(job.shards)):
        file = job.file(index)
        total += (work / file).stat().st_size
        with safe_open(work / file, framework="pt") as opened:
            weight_map |= dict.fromkeys(opened.keys(), file)
    index_file = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(work / "model.safetensors.index.json", index_file)
    for pattern in _DATA_FILES:
        for path in sorted(source.glob(pattern)):
            if path.name not in _OWN and path.is_file():
                shutil.copyfile(path, work / path.name)
    config = {
        **job.config,
        "torch_dtype": "bfloat16",
        "quantization_config": _quantization_config(form),
    }
    write_json(work / "config.json", config)
    card = model_card(source.name, form, errors, job.in_bytes, total, images)
    (work / "README.md").write_text(card, encoding="utf-8")
    return total


def _quantization_config(form: Format) -> dict[str, Any]:
    from compressed_tensors.quantization import QuantizationConfig

    config: dict[str, Any] = QuantizationConfig(
        config_groups={"group_0": form.quantization_scheme},
        format=form.compression,
        quantization_status="compressed",
        ignore=list(IGNORED),
    ).model_dump(mode="json", exclude_none=True)
    return config


def model_card(
    base: str,
    form: Format,
    errors: Mapping[str, float],
    in_bytes: int,
    out_bytes: int,
    images: int,
) -> str:
    """Markdown with the error of every layer; `images` is the number of calibration images."""
    worst = max(errors, key=lambda name: errors[name])
    searched = (
        f"The scale of each group is the best of {len(form.search)} by squared error."
        if len(form.search) > 1
        else "Scales cover the largest value of a row."
    )
    if images:
        used = (
            f"Calibrated on {images} image{'s' if images > 1 else ''}: columns of a layer "
            "are scaled by a power of the mean size of their inputs, chosen per layer by the error "
            "of its output; the inverse is in the norm or the layer before, so that the model "
            "computes the same. Squared errors are weighted with the mean square of a column's "
            "inputs."
        )
        counted = ", each column weighted with the mean square of its inputs on the images"
    else:
        used, counted = "No images and no text were used.", ""
    rows = "\n".join(f"| `{name}` | {error:.4f} |" for name, error in errors.items())
    return f"""# {base}, {form.scheme}

Made from `{base}` by molmo_edge {__version__} (`molmo-edge quantize`, scheme
`{form.scheme}`). The original's licence and terms of use hold for this copy too.

- Linear layers of the language model: {form.summary}.
  Rounded to nearest. {searched} {used}
- Vision tower, embeddings, norms, biases and LM head: bfloat16.
- Weights: {in_bytes / 1e9:.2f} GB → {out_bytes / 1e9:.2f} GB.
- Format: compressed-tensors, `{form.compression}`; vLLM loads it as it is.

Relative error of a layer is the Frobenius norm of (stored - original) over that of the
original{counted}:
median {statistics.median(errors.values()):.4f}, largest {errors[worst]:.4f} in `{worst}`.
It says nothing about answers: measure those with `molmo-edge bench drift` against the original.

| layer | relative error |
|---|---|
{rows}
"""
