"""Structured answers: a JSON Schema or a pydantic model in, a checked value out.

vLLM masks the tokens that would break the schema (`engine.structured`); this module only prepares
the schema and reads the answer, and imports neither vLLM nor torch.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from pydantic import BaseModel, ValidationError
from pydantic.errors import PydanticUserError

from molmo_edge.errors import GenerationError, SamplingError
from molmo_edge.results import Result

JsonSchema: TypeAlias = Mapping[str, Any] | type[BaseModel]
Reader: TypeAlias = Callable[[Result], Result]

_CUT = (
    "The answer was cut off before its JSON was complete; raise max_tokens, or bound the schema's "
    "texts and lists (maxLength, maxItems, enum)."
)
_STOPPED = "The answer is no complete JSON; a stop text may have ended it."


def prepare(given: object) -> tuple[dict[str, Any], Reader]:
    """The schema as plain JSON, and what turns an answer's text into its `parsed`.

    Raises:
        SamplingError: neither a mapping nor a pydantic model, empty, or not JSON.
    """
    model: type[BaseModel] | None = None
    if inspect.isclass(given) and issubclass(given, BaseModel):
        model = given
        try:
            given = model.model_json_schema()
        except PydanticUserError as exc:
            raise SamplingError(
                f"The pydantic model {model.__name__} has no JSON Schema; the cause is chained."
            ) from exc
    if not isinstance(given, Mapping) or not given:
        raise SamplingError(
            "json_schema must be a JSON Schema as a mapping, not empty, or a pydantic model class."
        )
    try:
        # A copy of its own: the caller may change theirs while the request waits.
        schema: dict[str, Any] = json.loads(json.dumps(dict(given), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as exc:
        raise SamplingError("json_schema holds values that are not JSON.") from exc
    return schema, lambda result: _read(result, model)


def _read(result: Result, model: type[BaseModel] | None) -> Result:
    """Raises GenerationError for an answer that is cut off, or that the model's checks refuse."""
    cut = result.finish_reason == "length"
    try:
        value = json.loads(result.text)
    except ValueError as exc:
        raise GenerationError(_CUT if cut else _STOPPED, partial=result.text) from exc
    if cut and type(value) in (int, float):  # any part of a number reads as a number
        raise GenerationError(_CUT, partial=result.text)
    if model is None:
        return replace(result, parsed=value)
    try:
        return replace(result, parsed=model.model_validate_json(result.text))
    except ValidationError as exc:
        raise GenerationError(
            f"The answer follows the schema, but the checks of {model.__name__} refuse it "
            f"({exc.error_count()} wrong); the chained error says why.",
            partial=result.text,
        ) from exc
