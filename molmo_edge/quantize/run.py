"""Checkpoints with fewer bytes a token: `quantize` writes what vLLM loads as it is.

The hub's tensors are read one at a time and stored in compressed-tensors' formats; the vision
tower, the embeddings and the LM head become BF16. The output appears under its name only when it
is whole. Knows nothing of terminals.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molmo_edge.errors import MissingDependencyError, QuantizeError
from molmo_edge.quantize.formats import Format, Packed, format_of, pack
from molmo_edge.quantize.plan import Plan, Tensor, plan
from molmo_edge.quantize.work import (
    CALIBRATION,
    STATE,
    check_disk,
    finish,
    nothing_left_behind,
    resume,
    save,
    write_json,
)

if TYPE_CHECKING:
    from molmo_edge.quantize.fold import Calibration

Progress = Callable[[int, int, str], None]
"""Called with bytes of the original done, bytes in all, and the tensor that was finished."""


@dataclass(frozen=True)
class Quantized:
    """What was done.

    Attributes:
        relative_errors: layer → Frobenius norm of (stored - original) over that of the original;
            after calibrating, each column counts with the mean square of its inputs.
        in_bytes, out_bytes: of all weights.
        resumed_files: output files that an interrupted run had finished.
        pictures: how many it was calibrated on.
    """

    folder: Path
    scheme: str
    relative_errors: dict[str, float]
    in_bytes: int
    out_bytes: int
    seconds: float
    resumed_files: int
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

    `calibrate` is a folder of typical pictures (JPEG, PNG, WebP or BMP; up to 16 are used), for the
    4-bit schemes. They are described by the model in float32 on the CPU, one block's weights in
    memory at a time; columns of loud inputs are then stored scaled up, the inverse goes exactly
    into the layer or norm before, and squared errors count by how loud a column's input is.

    A run that was killed or interrupted leaves ``<out_folder>.partial``, and the same call goes on
    from its finished files, or from the calibration if that was finished. After an error nothing
    is left.

    Raises:
        QuantizeError: unknown scheme, output exists, not enough disk, a checkpoint that is
            quantised already, lacks tensors, or holds weights that are no finite numbers; no
            pictures in `calibrate`, one that cannot be read, or a scheme that gains nothing.
        ModelError: no readable Molmo 1 checkpoint.
        MissingDependencyError: compressed-tensors, which vLLM brings, is not installed.
    """
    began = time.monotonic()
    form = format_of(scheme)
    _require_compressed_tensors()
    source, out = Path(model_folder).expanduser().absolute(), Path(out_folder).expanduser()
    out = out.absolute()
    if out.exists() or out.is_symlink():
        raise QuantizeError(f"'{out}' exists already. Give another output folder, or remove it.")
    if not out.parent.is_dir():
        raise QuantizeError(f"'{out.parent}' is no folder. Make it first, or give another output.")
    work = out.with_name(out.name + ".partial")
    planned = plan(source, form)
    pictures: list[Path] = []
    if calibrate is not None:
        pictures = _pictures(Path(calibrate).expanduser(), form)
        seen = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in pictures]
        mark = json.dumps([planned.fingerprint, seen])
        planned = dataclasses.replace(planned, fingerprint=mark)
    errors = resume(work, planned)
    resumed = len(errors)
    # What was done before is known by now; only a failure from here on takes it away.
    with nothing_left_behind(work):
        check_disk(work.parent, planned, resumed)
        work.mkdir(exist_ok=True)
        write_json(work / STATE, {"made_from": planned.fingerprint, "errors": errors})
        # Calibrating reads the layers once more.
        ahead = sum(t.in_bytes for shard in planned.shards for t in shard if t.packed)
        ahead = ahead if pictures else 0
        tell = _teller(progress, planned.in_bytes + ahead)
        known = _calibration(source, work, planned, form, pictures, ahead, tell)
        done = ahead + sum(t.in_bytes for shard in planned.shards[:resumed] for t in shard)
        for index in range(resumed, len(planned.shards)):
            errors.append({})
            made: dict[str, Any] = {}
            for tensor in planned.shards[index]:
                made |= _stored(source, tensor, form, known, errors[index])
                done += tensor.in_bytes
                tell(done, tensor.name)
            save(work / planned.file(index), made)
            write_json(work / STATE, {"made_from": planned.fingerprint, "errors": errors})
        relative_errors = {name: value for part in errors for name, value in part.items()}
        out_bytes = finish(source, work, planned, form, relative_errors, len(pictures))
        (work / CALIBRATION).unlink(missing_ok=True)
        (work / STATE).unlink()
        work.rename(out)
    seconds = time.monotonic() - began
    return Quantized(
        out, scheme, relative_errors, planned.in_bytes, out_bytes, seconds, resumed, len(pictures)
    )


def _pictures(folder: Path, form: Format) -> list[Path]:
    from molmo_edge.quantize.activations import picture_files

    if form.bits != 4:
        raise QuantizeError(
            f"Calibrating gains nothing in {form.scheme}: its values are rounded relative to their "
            "own size, whatever their column's scale. Leave it out, or use w4a16 or nvfp4."
        )
    return picture_files(folder)


def _teller(progress: Progress | None, total: int) -> Callable[[int, str], None]:
    return lambda done, name: None if progress is None else progress(done, total, name)


def _calibration(
    source: Path,
    work: Path,
    planned: Plan,
    form: Format,
    pictures: list[Path],
    ahead: int,
    tell: Callable[[int, str], None],
) -> Calibration | None:
    """Of this run or of the interrupted one; None without pictures."""
    if not pictures:
        return None
    from molmo_edge.quantize.calibrate import calibrate, heads_of
    from molmo_edge.quantize.fold import Calibration

    if (work / CALIBRATION).is_file():
        return Calibration.load(work / CALIBRATION, heads_of(planned))
    tell(0, f"Looking at {len(pictures)} pictures")
    made = calibrate(
        source, planned, form, pictures,
        lambda done, count: tell(ahead * done // count, f"Calibrated block {done} of {count}"),
    )  # fmt: skip
    save(work / CALIBRATION, made.tensors())
    return made


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
