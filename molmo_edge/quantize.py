"""Checkpoints with fewer bytes a token: `quantize` writes what vLLM loads as it is.

The hub's tensors are read one at a time and stored in compressed-tensors' formats; the vision
tower, the embeddings and the LM head become BF16. The output appears under its name only when it
is whole. Knows nothing of terminals.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molmo_edge.errors import MissingDependencyError, QuantizeError
from molmo_edge.quant_card import model_card
from molmo_edge.quant_formats import Format, Packed, format_of, pack
from molmo_edge.quant_plan import IGNORED, Plan, Tensor, plan

Progress = Callable[[int, int, str], None]
"""Called with bytes of the original done, bytes in all, and the tensor that was finished."""

_STATE = "molmo-edge-quantize.json"
# Of the original, everything but weights and code goes along.
_DATA_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")
_OWN = frozenset({"config.json", "model.safetensors.index.json"})
_SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class Quantized:
    """What was done.

    Attributes:
        relative_errors: layer → Frobenius norm of (stored - original) over that of the original.
        in_bytes, out_bytes: of all weights.
        resumed_files: output files that an interrupted run had finished.
    """

    folder: Path
    scheme: str
    relative_errors: dict[str, float]
    in_bytes: int
    out_bytes: int
    seconds: float
    resumed_files: int


def quantize(
    model_folder: str | Path,
    out_folder: str | Path,
    scheme: str,
    *,
    progress: Progress | None = None,
) -> Quantized:
    """Writes a quantised copy of a Molmo 1 checkpoint; needs no GPU and no pictures.

    Linear layers of the language model are stored as `scheme` says (``"fp8"``, ``"w4a16"`` or
    ``"nvfp4"``), rounded to nearest with the scale of each group searched for the least squared
    error; everything else becomes BF16. Memory holds one output file (half a gigabyte, or its one
    tensor) and one tensor of the original at a time.

    A run that was killed or interrupted leaves ``<out_folder>.partial``, and the same call goes on
    from its finished files. After an error nothing is left.

    Raises:
        QuantizeError: unknown scheme, output exists, not enough disk, a checkpoint that is
            quantised already, lacks tensors, or holds weights that are no finite numbers.
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
    errors = _resume(work, planned)
    resumed = len(errors)
    # What was done before is known by now; only a failure from here on takes it away.
    with _nothing_left_behind(work):
        _check_disk(work.parent, planned, resumed)
        work.mkdir(exist_ok=True)
        _write_json(work / _STATE, {"made_from": planned.fingerprint, "errors": errors})
        done = sum(t.in_bytes for shard in planned.shards[:resumed] for t in shard)
        for index in range(resumed, len(planned.shards)):
            errors.append({})
            made: dict[str, Any] = {}
            for tensor in planned.shards[index]:
                made |= _stored(source, tensor, form, errors[index])
                done += tensor.in_bytes
                if progress is not None:
                    progress(done, planned.in_bytes, tensor.name)
            _save(work / planned.file(index), made)
            _write_json(work / _STATE, {"made_from": planned.fingerprint, "errors": errors})
        relative_errors = {name: value for part in errors for name, value in part.items()}
        out_bytes = _finish(source, work, planned, form, relative_errors)
        (work / _STATE).unlink()
        work.rename(out)
    return Quantized(
        out, scheme, relative_errors, planned.in_bytes, out_bytes, time.monotonic() - began, resumed
    )


def _stored(
    source: Path, tensor: Tensor, form: Format, errors: dict[str, float]
) -> dict[str, Any]:
    import torch
    from safetensors import safe_open

    with safe_open(source / tensor.file, framework="pt") as opened:
        value = opened.get_tensor(tensor.name)
    if not tensor.packed:
        return {tensor.name: value.to(torch.bfloat16)}
    layer = tensor.name.removesuffix(".weight")
    try:
        packed: Packed = pack(value, form)
    except QuantizeError as exc:
        raise QuantizeError(f"'{tensor.name}' cannot be quantised: {exc}.") from None
    errors[layer] = packed.relative_error
    return {f"{layer}.{suffix}": part for suffix, part in packed.tensors.items()}


def _finish(
    source: Path, work: Path, planned: Plan, form: Format, errors: dict[str, float]
) -> int:
    """Everything beside the weights; returns the bytes of all weight files."""
    from safetensors import safe_open

    weight_map: dict[str, str] = {}
    total = 0
    for index in range(len(planned.shards)):
        file = planned.file(index)
        total += (work / file).stat().st_size
        with safe_open(work / file, framework="pt") as opened:
            weight_map |= dict.fromkeys(opened.keys(), file)
    index_file = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(work / "model.safetensors.index.json", index_file)
    for pattern in _DATA_FILES:
        for path in sorted(source.glob(pattern)):
            if path.name not in _OWN and path.is_file():
                shutil.copyfile(path, work / path.name)
    config = {
        **planned.config,
        "torch_dtype": "bfloat16",
        "quantization_config": _quantization_config(form),
    }
    _write_json(work / "config.json", config)
    card = model_card(source.name, form, errors, planned.in_bytes, total)
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


def _resume(work: Path, planned: Plan) -> list[dict[str, float]]:
    """Errors by finished output file of an interrupted run; none when it was another run's."""
    if not work.exists():
        return []
    try:
        state = json.loads((work / _STATE).read_text(encoding="utf-8"))
        errors, made_from = list(state["errors"]), state["made_from"]
    except (OSError, ValueError, KeyError, TypeError):
        if any(path.suffix != ".part" for path in work.iterdir()):
            raise QuantizeError(
                f"'{work}' is in the way, and not from an interrupted run. Remove it."
            ) from None
        return []
    whole = all((work / planned.file(i)).is_file() for i in range(len(errors)))
    if made_from == planned.fingerprint and whole:
        return errors
    shutil.rmtree(work)
    return []


@contextmanager
def _nothing_left_behind(work: Path) -> Iterator[None]:
    """Removes the unfinished output after an error; an interruption keeps it to go on from."""
    try:
        yield
    except OSError as exc:
        shutil.rmtree(work, ignore_errors=True)
        raise QuantizeError(
            f"'{work}' cannot be written ({exc.strerror or type(exc).__name__})."
        ) from exc
    except Exception:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _check_disk(folder: Path, planned: Plan, resumed: int) -> None:
    needed = _SPARE_BYTES + sum(t.out_bytes for part in planned.shards[resumed:] for t in part)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise QuantizeError(
            f"The output needs {needed / 1e9:.1f} GB, but '{folder}' has {free / 1e9:.1f} GB free."
        )


def _save(path: Path, tensors: dict[str, Any]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # Aside and renamed: a file under its name is whole.
    part = path.with_suffix(".part")
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, part, metadata={"format": "pt"})
    except SafetensorError as exc:
        raise OSError(str(exc)) from exc
    part.replace(path)


def _write_json(path: Path, value: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    part.replace(path)


def _require_compressed_tensors() -> None:
    import importlib.util

    if importlib.util.find_spec("compressed_tensors") is None:
        raise MissingDependencyError(
            'Quantising needs compressed-tensors, which comes with vLLM: pip install '
            '"molmo-edge[cuda]" or "molmo-edge[cpu]".'
        )
