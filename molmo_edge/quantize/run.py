"""Write a quantised copy of a checkpoint.

Tensors of the original are read one at a time and stored in compressed-tensors formats; the vision
tower, the embeddings and the LM head become bfloat16.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from molmo_edge._version import __version__
from molmo_edge.checkpoint_files import INDEX, Tensor
from molmo_edge.errors import QuantizeError
from molmo_edge.quantize.calibrate import Calibration, choose_images
from molmo_edge.quantize.calibrate import calibrate as run_calibration
from molmo_edge.quantize.formats import Format, format_of, pack
from molmo_edge.quantize.plan import IGNORED, Job, is_quantized, plan

SHARD_BYTES = 1 << 29  # an output file is held in memory until it is written
_SPARE_BYTES = 64 << 20
# Everything of the original but weights and code is copied.
_DATA_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")


@dataclass(frozen=True)
class Quantized:
    """Result of `quantize`.

    Attributes:
        directory: of the new checkpoint.
        relative_errors: layer → Frobenius norm of (stored - original) over that of the original;
            after calibration, each column is weighted with the mean square of its inputs.
        in_bytes, out_bytes: of all weights.
        images: number of calibration images.
    """

    directory: Path
    scheme: str
    relative_errors: dict[str, float]
    in_bytes: int
    out_bytes: int
    seconds: float
    images: int = 0


def quantize(
    checkpoint: str | Path,
    out: str | Path,
    scheme: str,
    *,
    calibrate: str | Path | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
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

    `progress` gets the amount done, the amount in all, and what was just finished: blocks while
    the images are processed, then bytes of the original.

    `out` appears only when it is complete. A killed run may leave a hidden directory
    ``.<out>.quantize`` beside it, which the next run deletes.

    Raises:
        QuantizeError: unknown scheme, output exists, not enough disk space, a checkpoint that is
            quantised already, lacks tensors, or contains NaN or infinity; no images in
            `calibrate`, an unreadable one, or a scheme that gains nothing from calibration.
        ModelError: no readable Molmo 1 checkpoint.
        MissingDependencyError: torch or compressed-tensors, which come with vLLM, is missing.
    """
    began = time.monotonic()
    form = format_of(scheme)
    source, out = Path(checkpoint).expanduser(), Path(out).expanduser().absolute()
    if out.exists() or out.is_symlink():
        raise QuantizeError(f"'{out}' exists already. Give another output, or remove it.")
    if not out.parent.is_dir():
        raise QuantizeError(f"'{out.parent}' is not a directory. Create it first.")
    if calibrate is not None and form.bits != 4:
        raise QuantizeError(
            f"Calibration gains nothing in {scheme}: its values are rounded relative to their own "
            "size, whatever their column's scale. Leave it out, or use w4a16 or nvfp4."
        )
    job = plan(source, form)
    images = [] if calibrate is None else choose_images(Path(calibrate).expanduser())
    work = out.with_name(f".{out.name}.quantize")
    try:
        shutil.rmtree(work, ignore_errors=True)
        check_disk(out.parent, job)
        work.mkdir()
        calibration = run_calibration(source, job, form, images, progress) if images else None
        errors, out_bytes = write_weights(work, job, form, calibration, progress)
        write_data_files(source, work, job, form)
        card = model_card(source.name, form, errors, job.in_bytes, out_bytes, len(images))
        (work / "README.md").write_text(card, encoding="utf-8")
        work.rename(out)
    except (OSError, SafetensorError) as exc:
        raise QuantizeError(f"'{out}' cannot be written: {exc}") from exc
    finally:
        shutil.rmtree(work, ignore_errors=True)
    seconds = time.monotonic() - began
    return Quantized(out, scheme, errors, job.in_bytes, out_bytes, seconds, len(images))


def check_disk(directory: Path, job: Job) -> None:
    needed = _SPARE_BYTES + job.out_bytes
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise QuantizeError(
            f"The output needs {needed / 1e9:.1f} GB, but '{directory}' has {free / 1e9:.1f} GB "
            "free."
        )


def write_weights(
    work: Path,
    job: Job,
    form: Format,
    calibration: Calibration | None,
    progress: Callable[[int, int, str], None],
) -> tuple[dict[str, float], int]:
    """Write weight files and their index; returns the error by layer and the files' bytes."""
    errors: dict[str, float] = {}
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    done = total = 0

    def save_shard() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, work / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for tensor in job.tensors:
        stored = _stored(tensor, form, calibration, errors)
        size = sum(part.nbytes for part in stored.values())
        if shard and sum(part.nbytes for part in shard.values()) + size > SHARD_BYTES:
            save_shard()
        shard |= stored
        total += size
        done += tensor.nbytes
        progress(done, job.in_bytes, tensor.name)
    save_shard()
    _write_json(work / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return errors, total


def _stored(
    tensor: Tensor, form: Format, calibration: Calibration | None, errors: dict[str, float]
) -> dict[str, torch.Tensor]:
    """The output's tensors for one of the original; adds a quantised layer's error to `errors`."""
    with safe_open(tensor.file, framework="pt") as opened:
        value = opened.get_tensor(tensor.name)
    if not bool(value.isfinite().all()):
        raise QuantizeError(f"'{tensor.name}' contains NaN or infinity.")
    if calibration is not None:
        value = calibration.apply(tensor.name, value)
    if not is_quantized(tensor.name):
        return {tensor.name: value.to(torch.bfloat16).contiguous()}
    layer = tensor.name.removesuffix(".weight")
    importance = None if calibration is None else calibration.importance(layer)
    packed, errors[layer] = pack(value, form, importance)
    return {f"{layer}.{suffix}": part.contiguous() for suffix, part in packed.items()}


def write_data_files(source: Path, work: Path, job: Job, form: Format) -> None:
    """Copy everything but weights and code; config.json gets the quantisation."""
    for pattern in _DATA_FILES:
        for path in source.glob(pattern):
            if path.name != INDEX:
                shutil.copyfile(path, work / path.name)
    quantization = QuantizationConfig(
        config_groups={"group_0": form.quantization_scheme},
        format=form.compression,
        quantization_status="compressed",
        ignore=list(IGNORED),
    ).model_dump(mode="json", exclude_none=True)
    extra = {"torch_dtype": "bfloat16", "quantization_config": quantization}
    _write_json(work / "config.json", {**job.config, **extra})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def model_card(
    base: str,
    form: Format,
    errors: Mapping[str, float],
    in_bytes: int,
    out_bytes: int,
    images: int,
) -> str:
    """Markdown; `images` is the number of calibration images."""
    worst = max(errors, key=lambda name: errors[name])
    used, counted = "No images and no text were used.", ""
    if images:
        used = (
            f"Calibrated on {images} image{'s' if images > 1 else ''}: columns of a layer are "
            "scaled by a power of the mean size of their inputs, chosen per layer by the error of "
            "its output; the inverse is in the norm or the layer before, so that the model "
            "computes the same."
        )
        counted = ", each column weighted with the mean square of its inputs on the images"
    return f"""# {base}, {form.scheme}

Made from `{base}` by molmo_edge {__version__} (`molmo-edge quantize`, scheme
`{form.scheme}`). The original's licence and terms of use hold for this copy too.

- Linear layers of the language model: {form.summary}.
  Rounded to nearest, with the best of {len(form.search)} scales by squared error. {used}
- Vision tower, embeddings, norms, biases and LM head: bfloat16.
- Weights: {in_bytes / 1e9:.2f} GB → {out_bytes / 1e9:.2f} GB.
- Format: compressed-tensors, `{form.compression}`; vLLM loads it as it is.

Relative error of a layer is the Frobenius norm of (stored - original) over that of the
original{counted}:
median {statistics.median(errors.values()):.4f}, largest {errors[worst]:.4f} in `{worst}`.
It says nothing about answers: measure those with `molmo-edge bench drift` against the original.
"""
