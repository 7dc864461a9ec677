"""Write quantised checkpoints: `quantize` writes what vLLM loads as it is.

The hub's tensors are read one at a time and stored in compressed-tensors' formats; the vision
tower, the embeddings and the LM head become BF16.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molmo_edge._version import __version__
from molmo_edge.errors import MissingDependencyError, QuantizeError
from molmo_edge.quantize.formats import Format, Packed, format_of, pack
from molmo_edge.quantize.plan import IGNORED, Job, Tensor, plan

if TYPE_CHECKING:
    from molmo_edge.quantize.calibrate import Calibration

Progress = Callable[[int, int, str], None]
"""Called with bytes of the original done, bytes in all, and the tensor that was finished."""


@dataclass(frozen=True)
class Quantized:
    """What was done.

    Attributes:
        relative_errors: layer → Frobenius norm of (stored - original) over that of the original;
            after calibrating, each column counts with the mean square of its inputs.
        in_bytes, out_bytes: of all weights.
        pictures: how many images it was calibrated on.
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
    """Writes a quantised copy of a Molmo 1 checkpoint; needs no GPU.

    Linear layers of the language model are stored as `scheme` says (``"fp8"``, ``"w4a16"`` or
    ``"nvfp4"``), rounded to nearest with the scale of each group searched for the least squared
    error; everything else becomes BF16. Memory holds one output file (half a gigabyte, or its one
    tensor) and one tensor of the original at a time.

    `calibrate` holds typical images (JPEG, PNG, WebP or BMP; up to 16 are used), for the
    4-bit schemes. They are described by the model in float32 on the CPU, one block's weights in
    memory at a time; columns of loud inputs are then stored scaled up, the inverse goes exactly
    into the layer or norm before, and squared errors count by how loud a column's input is.

    The output appears under its name only when it is complete. A run that was killed leaves a
    hidden ``.<out_folder>.XXXX.partial`` directory that nothing reads; start it again.

    Raises:
        QuantizeError: unknown scheme, output exists, not enough disk, a checkpoint that is
            quantised already, lacks tensors, or holds weights that are NaN or infinity; no
            images in `calibrate`, one that cannot be read, or a scheme that gains nothing.
        ModelError: no readable Molmo 1 checkpoint.
        MissingDependencyError: compressed-tensors, which vLLM brings, is not installed.
    """
    began = time.monotonic()
    form = format_of(scheme)
    _require_compressed_tensors()
    source, out = Path(model_folder).expanduser().absolute(), Path(out_folder).expanduser()
    out = out.absolute()
    if out.exists() or out.is_symlink():
        raise QuantizeError(f"'{out}' exists already. Give another output, or remove it.")
    if not out.parent.is_dir():
        raise QuantizeError(f"'{out.parent}' is not a directory. Create it first.")
    job = plan(source, form)
    files = [] if calibrate is None else _images(Path(calibrate).expanduser(), form)
    check_disk(out.parent, job)
    # Calibrating reads the layers once more.
    ahead = sum(t.in_bytes for shard in job.shards for t in shard if t.packed) if files else 0
    report = _reporter(progress, job.in_bytes + ahead)
    try:
        with tempfile.TemporaryDirectory(
            prefix=f".{out.name}.", suffix=".partial", dir=out.parent
        ) as name:
            work = Path(name) / out.name
            work.mkdir()
            known = _calibration(source, job, form, files, ahead, report)
            errors: dict[str, float] = {}
            done = ahead
            for index, shard in enumerate(job.shards):
                stored: dict[str, Any] = {}
                for tensor in shard:
                    stored |= _stored(source, tensor, form, known, errors)
                    done += tensor.in_bytes
                    report(done, tensor.name)
                save(work / job.file(index), stored)
            out_bytes = finish(source, work, job, form, errors, len(files))
            work.rename(out)
    except OSError as exc:
        raise QuantizeError(
            f"'{out}' cannot be written ({exc.strerror or type(exc).__name__})."
        ) from exc
    seconds = time.monotonic() - began
    return Quantized(out, scheme, errors, job.in_bytes, out_bytes, seconds, len(files))


def _images(folder: Path, form: Format) -> list[Path]:
    from molmo_edge.quantize.calibrate import image_files

    if form.bits != 4:
        raise QuantizeError(
            f"Calibrating gains nothing in {form.scheme}: its values are rounded relative to their "
            "own size, whatever their column's scale. Leave it out, or use w4a16 or nvfp4."
        )
    return image_files(folder)


def _reporter(progress: Progress | None, total: int) -> Callable[[int, str], None]:
    return lambda done, name: None if progress is None else progress(done, total, name)


def _calibration(
    source: Path,
    job: Job,
    form: Format,
    files: list[Path],
    ahead: int,
    report: Callable[[int, str], None],
) -> Calibration | None:
    if not files:
        return None
    from molmo_edge.quantize.calibrate import calibrate

    report(0, f"Reading {len(files)} images")

    def progress(done: int, count: int) -> None:
        report(ahead * done // count, f"Calibrated block {done} of {count}")

    return calibrate(source, job, form, files, progress)


def _stored(
    source: Path,
    tensor: Tensor,
    form: Format,
    known: Calibration | None,
    errors: dict[str, float],
) -> dict[str, Any]:
    import torch
    from safetensors import safe_open

    with safe_open(source / tensor.file, framework="pt") as opened:
        value = opened.get_tensor(tensor.name)
    if known is not None:
        value = known.apply(tensor.name, value)
    if not tensor.packed:
        return {tensor.name: value.to(torch.bfloat16)}
    layer = tensor.name.removesuffix(".weight")
    try:
        importance = None if known is None else known.importance(layer)
        packed: Packed = pack(value, form, importance)
    except QuantizeError as exc:
        raise QuantizeError(f"'{tensor.name}' cannot be quantised: {exc}.") from None
    errors[layer] = packed.relative_error
    return {f"{layer}.{suffix}": part for suffix, part in packed.tensors.items()}


def _require_compressed_tensors() -> None:
    import importlib.util

    if importlib.util.find_spec("compressed_tensors") is None:
        raise MissingDependencyError(
            'Quantising needs compressed-tensors, which comes with vLLM: pip install '
            '"molmo-edge[cuda]" or "molmo-edge[cpu]".'
        )


_SPARE_BYTES = 64 << 20
# Of the original, everything but weights and code goes along.
_DATA_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")
_OWN = frozenset({"config.json", "model.safetensors.index.json"})


def check_disk(directory: Path, job: Job) -> None:
    needed = _SPARE_BYTES + sum(t.out_bytes for part in job.shards for t in part)
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise QuantizeError(
            f"The output needs {needed / 1e9:.1f} GB, but '{directory}' has {free / 1e9:.1f} GB "
            "free."
        )


def save(path: Path, tensors: dict[str, Any]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # Aside and renamed: a file under its name is whole.
    part = path.with_suffix(".part")
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, part, metadata={"format": "pt"})
    except SafetensorError as exc:
        raise OSError(str(exc)) from exc
    part.replace(path)


def write_json(path: Path, value: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    part.replace(path)


def finish(
    source: Path, work: Path, job: Job, form: Format, errors: dict[str, float], images: int
) -> int:
    """Everything beside the weights; returns the bytes of all weight files."""
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

    made: dict[str, Any] = QuantizationConfig(
        config_groups={"group_0": form.quantization_scheme},
        format=form.compression,
        quantization_status="compressed",
        ignore=list(IGNORED),
    ).model_dump(mode="json", exclude_none=True)
    return made


def model_card(
    base: str,
    form: Format,
    errors: Mapping[str, float],
    in_bytes: int,
    out_bytes: int,
    images: int = 0,
) -> str:
    """Markdown with the error of every layer; `images` is how many it was calibrated on."""
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
            "computes the same. Squared errors count by the mean square of a column's inputs."
        )
        counted = ", each column counting with the mean square of its inputs on the images"
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
