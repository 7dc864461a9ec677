"""The checks one value of a setting goes through, and the words for what is wrong with it.

Knows types, ranges and refused values; not which settings there are, nor where they come from.
"""

from __future__ import annotations

import json
import math
import numbers
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import ErrorDetails

from molmo_edge.settings_sources import nearest, show

PrecisionWord = Literal["auto", "bf16", "fp8", "w4a16", "nvfp4"]
KVCacheDtype = Literal[
    "auto",
    "fp8",
    "fp8_e4m3",
    "fp8_e5m2",
    "fp8_per_token_head",
    "int8_per_token_head",
    "bfloat16",
]

_MOE_ONLY = "touches MoE layers only and silently leaves dense layers, which Molmo's are, in BF16"
# https://docs.vllm.ai/en/latest/features/quantization/int8/ ("Blackwell GPU Limitation")
_NO_INT8 = "vLLM has no 8-bit integer matrix product on Blackwell GPUs (sm_100 and up)"
_REFUSED_PRECISION = {
    "bitsandbytes": "vLLM 0.32 no longer has it; its 4-bit formats are w4a16 and nvfp4",
    "nvfp4_per_token": f"it {_MOE_ONLY}; use nvfp4 with a quantised checkpoint, or fp8",
    "int8_per_channel_weight_only": f"it {_MOE_ONLY}; use fp8, or w4a16 with its checkpoint",
    "int8": f"{_NO_INT8}; use fp8",
    "w8a8": f"{_NO_INT8}; use fp8",
}
_MAX_DEPTH = 32

_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number of fewer digits",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "string_unicode": "UTF-8 text",
    "path_type": "the path of a folder",
    "dict_type": "a table of names and values",
}
_LIMIT = {"greater_than": "above", "greater_than_equal": "at least", "less_than_equal": "at most"}


def explain(error: ErrorDetails, given: object) -> str:
    """What pydantic found wrong, as the rest of a sentence that begins with the setting's name."""
    kind = error["type"]
    context = error.get("ctx", {})
    if kind == "value_error":  # one of the validators below
        return str(context["error"])
    if kind == "literal_error":
        words = re.findall(r"'([^']*)'", str(context["expected"]))
        hint = f"; the nearest valid word is {nearest(given, words)}" if type(given) is str else ""
        return f"must be one of {', '.join(words)}, not {show(given)}{hint}"
    if kind in _LIMIT:
        return f"must be {_LIMIT[kind]} {next(iter(context.values()))}, not {show(given)}"
    return f"must be {_EXPECTED.get(kind, 'of another kind')}, not {show(given)}"


def json_object(text: str) -> dict[str, Any]:
    """A table given as text.

    Raises:
        ValueError: the rest of a sentence, as from ``explain()``.
    """
    example = 'a JSON object such as {"max_num_batched_tokens": 4096}'
    try:
        table = json.loads(text)
    except json.JSONDecodeError as exc:
        where = f"line {exc.lineno}, column {exc.colno}"
        raise ValueError(f"must be {example}; {exc.msg} at {where}") from None
    except (ValueError, RecursionError):  # an integer of thousands of digits, brackets likewise
        raise ValueError(f"must be {example}, of ordinary size") from None
    if not isinstance(table, dict):
        raise ValueError(f"must be {example}, not {show(text)}")
    return table


def _one_line(value: str) -> str:
    if not value.strip() or not value.isprintable():
        raise ValueError(f"must be a line of visible text, not {show(value)}")
    return value


def _folder(value: Path) -> Path:
    try:
        path = value.expanduser()
    except RuntimeError:
        raise ValueError(f"{show(str(value))} begins with a home folder that is unknown") from None
    if path == Path() or not str(path).isprintable():
        raise ValueError(f"must be the path of a folder, not {show(str(path))}")
    return path


def _not_refused(value: object) -> object:
    if isinstance(value, str):
        reason = _REFUSED_PRECISION.get(value.strip().lower().replace("-", "_"))
        if reason is not None:
            words = ", ".join(get_args(PrecisionWord))
            raise ValueError(f"{show(value)} is refused: {reason}. Valid words: {words}")
    return value


def _own_copy(value: Any, at: str = "", depth: int = 0) -> Any:
    """Fresh dicts and lists, so that frozen settings stay so; every number in them finite."""
    if depth > _MAX_DEPTH:
        raise ValueError("is nested too deeply")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or not key.strip():
                raise ValueError(f"has the key {show(key)}, where a name is expected")
        return {key: _own_copy(item, f"{at}.{key}", depth + 1) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_own_copy(item, at, depth + 1) for item in value)
    real = isinstance(value, numbers.Real) and not isinstance(value, numbers.Rational)
    if real and not math.isfinite(value):
        raise ValueError(f"must hold finite numbers only, not {show(float(value))} at {at[1:]}")
    return value


Line = Annotated[str, AfterValidator(_one_line)]
Folder = Annotated[Path, Field(strict=False), AfterValidator(_folder)]
Precision = Annotated[PrecisionWord, BeforeValidator(_not_refused)]
EngineArgs = Annotated[dict[str, Any], BeforeValidator(_own_copy)]
