"""The output while it is made: a folder beside it that is kept after an interruption only.

Knows files and their state, nothing about how tensors are made.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from molmo_edge.errors import QuantizeError
from molmo_edge.quantize.card import model_card
from molmo_edge.quantize.formats import Format
from molmo_edge.quantize.plan import IGNORED, Plan

STATE = "molmo-edge-quantize.json"
CALIBRATION = "molmo-edge-calibration.safetensors"
_SPARE_BYTES = 64 << 20
# Of the original, everything but weights and code goes along.
_DATA_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")
_OWN = frozenset({"config.json", "model.safetensors.index.json"})


def resume(work: Path, planned: Plan) -> list[dict[str, float]]:
    """Errors by finished output file of an interrupted run; none when it was another run's."""
    if not work.exists():
        return []
    try:
        state = json.loads((work / STATE).read_text(encoding="utf-8"))
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
def nothing_left_behind(work: Path) -> Iterator[None]:
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


def check_disk(folder: Path, planned: Plan, resumed: int) -> None:
    needed = _SPARE_BYTES + sum(t.out_bytes for part in planned.shards[resumed:] for t in part)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise QuantizeError(
            f"The output needs {needed / 1e9:.1f} GB, but '{folder}' has {free / 1e9:.1f} GB free."
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
    source: Path, work: Path, planned: Plan, form: Format, errors: dict[str, float], pictures: int
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
    write_json(work / "model.safetensors.index.json", index_file)
    for pattern in _DATA_FILES:
        for path in sorted(source.glob(pattern)):
            if path.name not in _OWN and path.is_file():
                shutil.copyfile(path, work / path.name)
    config = {
        **planned.config,
        "torch_dtype": "bfloat16",
        "quantization_config": _quantization_config(form),
    }
    write_json(work / "config.json", config)
    card = model_card(source.name, form, errors, planned.in_bytes, total, pictures)
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
