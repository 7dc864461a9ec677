"""Write a quantised copy of a checkpoint.

Linear layers of the language model, and its head where asked, are stored in compressed-tensors
formats, everything else in bfloat16. Each file of the original becomes one of the copy.
"""

from __future__ import annotations

import itertools
import re
import shutil
import stat
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from molmo_edge._version import __version__
from molmo_edge.checkpoint_files import INDEX, Tensor, check_tensors, check_weights, read_config
from molmo_edge.checkpoint_files import tensors as read_headers
from molmo_edge.devices.tensors import molmo2_tensor_shapes, tensor_shapes
from molmo_edge.errors import QuantizeError
from molmo_edge.files import expand_home, file_mode, replacing
from molmo_edge.models.molmo.config import check_layout as check_molmo
from molmo_edge.models.molmo2.config import check_layout as check_molmo2
from molmo_edge.models.synthetic import write_json
from molmo_edge.quantize.calibrate import Calibration, read_prompts
from molmo_edge.quantize.calibrate import calibrate as run_calibration
from molmo_edge.quantize.formats import DEFAULT_HEADS, FORMATS, HEADS, Format, pack
from molmo_edge.reference.checkpoint import tower_of

# Linear layers of the language model. Every MLP ends in `.ff_out` and so does the LM head.
_QUANTIZED = re.compile(
    r"model\.transformer\.blocks\.\d+\.(self_attn\.|mlp\.)?(att_proj|attn_out|ff_proj|ff_out)\.weight"
)
# Of Molmo 1 and 2.
_HEAD = re.compile(r"(model\.transformer\.ff_out|lm_head)\.weight")
_VISION = "re:.*vision_backbone.*"
# The head by the checkpoints' names and by vLLM's.
_HEAD_TARGETS = r"re:^model\.transformer\.ff_out$", "lm_head"
_SPARE_BYTES = 64 << 20  # for everything but weights
# Everything of the original but weights and code is copied.
_DATA_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")

Progress = Callable[[int, int, str], object]


@dataclass(frozen=True)
class Quantized:
    """Result of `quantize`.

    Attributes:
        directory: of the new checkpoint.
        scheme, head: how blocks and LM head are stored.
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
    head: str = "none"


def quantize(
    checkpoint: str | Path,
    out: str | Path,
    scheme: str,
    *,
    head: str | None = None,
    calibrate: str | Path | None = None,
    progress: Progress = lambda done, total, name: None,
) -> Quantized:
    """Write a quantised copy of a Molmo 1 or 2 checkpoint; needs no GPU.

    Linear layers of the language model are stored as `scheme` says (``"fp8"``, ``"w4a16"`` or
    ``"nvfp4"``), rounded to nearest with the scale of each group searched for the least squared
    error; the LM head as `head` says (``"fp8"``, ``"w8a16"``, ``"w4a16"`` or ``"none"``; by default
    ``"fp8"`` beside 4-bit blocks); everything else becomes bfloat16. Memory holds one file of the
    copy at a time.

    `calibrate` is a directory of typical images (JPEG, PNG, WebP or BMP; up to 16 are used), for
    the 4-bit schemes. The model processes them in float32 on the CPU with the weights of one block
    in memory at a time. Columns with large inputs are then scaled up before rounding, which the
    layer or norm before compensates, and squared errors are weighted with the mean square of a
    column's inputs.

    `progress` gets the amount done, the amount in all, and what was just finished: blocks while
    the images are processed, then bytes of the original.

    `out` appears only when it is complete. A killed run may leave a hidden directory beside it,
    which the next run deletes.

    Raises:
        QuantizeError: unknown scheme or head, output exists, not enough disk space, a checkpoint
            that is quantised already or contains NaN or infinity; no images in `calibrate`, an
            unreadable one, or a scheme that gains nothing from calibration.
        ModelError: no readable Molmo checkpoint, or one that lacks tensors.
    """
    began = time.monotonic()
    if scheme not in FORMATS:
        raise QuantizeError(f"Unknown scheme '{scheme}'; expected one of {', '.join(FORMATS)}.")
    head = DEFAULT_HEADS[scheme] if head is None else head
    if not isinstance(head, str) or head not in HEADS:
        raise QuantizeError(f"Unknown LM head '{head}'; expected one of {', '.join(HEADS)}.")
    form, head_form = FORMATS[scheme], HEADS[head]
    source, out = expand_home(checkpoint), expand_home(out).absolute()
    if file_mode(out):
        raise QuantizeError(f"'{out}' exists already. Give another output, or remove it.")
    if not stat.S_ISDIR(file_mode(out.parent)):
        raise QuantizeError(f"'{out.parent}' is not a directory. Create it first.")
    if calibrate is not None and form.bits != 4:
        raise QuantizeError(
            f"Calibration gains nothing in {scheme}: its values are rounded relative to their own "
            "size, whatever their column's scale. Leave it out, or use w4a16 or nvfp4."
        )
    config = read_config(source)
    tensors = read_tensors(source, config)
    formats = choose_formats(tensors, form, head_form)
    prompts = [] if calibrate is None else read_prompts(source, expand_home(calibrate))
    try:
        with replacing(out) as work:
            check_disk(out.parent, tensors, formats)
            work.mkdir()
            calibration = Calibration()
            if prompts:
                calibration = run_calibration(config, tensors, form, head_form, prompts, progress)
            errors, out_bytes = write_weights(work, tensors, formats, calibration, progress)
            write_data_files(source, work, config, form, head_form)
            in_bytes = sum(tensor.nbytes for tensor in tensors)
            seconds = time.monotonic() - began
            images = len(prompts)
            result = Quantized(out, scheme, errors, in_bytes, out_bytes, seconds, images, head)
            (work / "README.md").write_text(model_card(source.name, result), encoding="utf-8")
    except (OSError, SafetensorError) as exc:
        raise QuantizeError(f"'{out}' cannot be written: {exc}") from exc
    return result


def read_tensors(directory: Path, config: Mapping[str, Any]) -> list[Tensor]:
    """The tensors of an unquantised checkpoint that fits its `config`, by their headers."""
    molmo2 = config.get("model_type") == "molmo2"
    (check_molmo2 if molmo2 else check_molmo)(config)
    check_weights(directory)
    if config.get("quantization_config") is not None:
        raise QuantizeError(
            f"'{directory}' is quantised already (its config.json has a quantization_config). Give "
            "the original checkpoint."
        )
    stored = read_headers(directory)
    if molmo2:
        shapes = molmo2_tensor_shapes(config)
    else:
        shapes = tensor_shapes(config, tower_of({one.name: one.shape for one in stored}))
    check_tensors(stored, shapes)
    return stored


def choose_formats(
    tensors: Sequence[Tensor], form: Format, head: Format | None
) -> dict[str, Format]:
    """The formats of tensors that are quantised, by name."""
    formats = {}
    for tensor in tensors:
        is_head = _HEAD.fullmatch(tensor.name)
        chosen = head if is_head else form if _QUANTIZED.fullmatch(tensor.name) else None
        if chosen is None:
            continue
        if chosen.group and tensor.shape[1] % chosen.group:
            raise QuantizeError(
                f"'{tensor.name}' has {tensor.shape[1]} columns, not a multiple of the "
                f"{chosen.group} that share a scale. Use {'--head' if is_head else '--scheme'} fp8."
            )
        formats[tensor.name] = chosen
    return formats


def check_disk(directory: Path, tensors: Sequence[Tensor], formats: Mapping[str, Format]) -> None:
    # One bit per value is more than any format's scales take.
    needed = _SPARE_BYTES + sum(
        tensor.numel * (formats[tensor.name].bits + 1 if tensor.name in formats else 16) // 8
        for tensor in tensors
    )
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise QuantizeError(
            f"The output needs {needed / 1e9:.1f} GB, but '{directory}' has {free / 1e9:.1f} GB "
            "free."
        )


def write_weights(
    work: Path,
    tensors: Sequence[Tensor],
    formats: Mapping[str, Format],
    calibration: Calibration,
    progress: Progress,
) -> tuple[dict[str, float], int]:
    """Write weight files and their index; returns the error by layer and the files' bytes."""
    errors: dict[str, float] = {}
    weight_map: dict[str, str] = {}
    in_bytes = sum(tensor.nbytes for tensor in tensors)
    read_bytes = out_bytes = 0
    for path, group in itertools.groupby(tensors, key=lambda tensor: tensor.file):
        stored: dict[str, torch.Tensor] = {}
        with safe_open(path, framework="pt") as original:
            for tensor in group:
                value = original.get_tensor(tensor.name)
                if not bool(value.isfinite().all()):
                    raise QuantizeError(f"'{tensor.name}' contains NaN or infinity.")
                for factor in calibration.factors.get(tensor.name, ()):
                    value = value.float() * factor
                if tensor.name in formats:
                    layer = tensor.name.removesuffix(".weight")
                    importance = calibration.importance.get(layer, 1.0)
                    parts, errors[layer] = pack(value, formats[tensor.name], importance)
                    stored |= {f"{layer}.{suffix}": part for suffix, part in parts.items()}
                else:
                    stored[tensor.name] = value.to(torch.bfloat16)
                read_bytes += tensor.nbytes
                progress(read_bytes, in_bytes, tensor.name)
        stored = {name: value.contiguous() for name, value in stored.items()}
        save_file(stored, work / path.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(stored, path.name)
        out_bytes += sum(value.nbytes for value in stored.values())
    index = {"metadata": {"total_size": out_bytes}, "weight_map": weight_map}
    write_json(work, {INDEX: index})
    return errors, out_bytes


def write_data_files(
    source: Path, work: Path, config: Mapping[str, Any], form: Format, head: Format | None
) -> None:
    """Copy everything but weights and code; config.json gets the quantisation."""
    for pattern in _DATA_FILES:
        for path in source.glob(pattern):
            if path.name != INDEX:
                shutil.copyfile(path, work / path.name)
    groups, ignored = {"group_0": form.quantization_scheme}, [_VISION]
    compression = form.compression
    if head is None:
        ignored += _HEAD_TARGETS
    else:
        groups["group_1"] = head.scheme_of(*_HEAD_TARGETS)
        if head.compression != compression:
            compression = "mixed-precision"
    quantization = QuantizationConfig(
        config_groups=groups,
        format=compression,
        quantization_status="compressed",
        ignore=ignored,
    ).model_dump(mode="json", exclude_none=True)
    dtype = "dtype" if "dtype" in config else "torch_dtype"  # of newer and older files
    extra = {dtype: "bfloat16", "quantization_config": quantization}
    write_json(work, {"config.json": {**config, **extra}})


def model_card(base: str, result: Quantized) -> str:
    """Markdown: how the copy was made."""
    form, head, errors = FORMATS[result.scheme], HEADS[result.head], result.relative_errors
    loader = "as it is" if head is None else "with molmo_edge installed, for the LM head"
    worst = max(errors, key=lambda name: errors[name])
    return f"""# {base}, {result.scheme}

Made from `{base}` by molmo_edge {__version__} (`molmo-edge quantize`, scheme `{result.scheme}`,
LM head `{result.head}`).
The original's licence and terms of use hold for this copy too.

- Linear layers of the language model: {form.summary}.
- LM head: {head.summary if head else "bfloat16"}.
- Vision tower, embeddings, norms and biases: bfloat16.
- Calibration images: {result.images or "none"}.
- Weights: {result.in_bytes / 1e9:.2f} GB → {result.out_bytes / 1e9:.2f} GB.
- Format: compressed-tensors; vLLM loads it {loader}.
- Relative error of a layer's weights: median {statistics.median(errors.values()):.4f}, largest
  {errors[worst]:.4f} in `{worst}`. It says nothing about answers: measure those with
  `molmo-edge bench drift` against the original.
"""
