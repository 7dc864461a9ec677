"""Structured answers on the real engine: valid JSON comes out, and no schema is half honoured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jsonschema
import numpy as np
import pytest
from pydantic import BaseModel, Field

from molmo_edge import EdgeVLM
from molmo_edge.errors import GenerationError, SamplingError
from molmo_edge.models.molmo.stub import TEXT

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

# Made-up weights would fill any free white space or extra property for ever.
CLOSED = {
    "backend": "guidance",
    "disable_any_whitespace": True,
    "disable_additional_properties": True,
}


class Door(BaseModel):
    open: bool
    colour: Literal["red", "green"]
    handles: int = Field(ge=0, le=9)


@pytest.fixture(scope="module")
def strict_vlm(cache_dir: Path) -> Iterator[EdgeVLM]:
    with EdgeVLM(
        "stub",
        cache_dir=cache_dir,
        max_model_len=2048,
        kv_cache_memory_gb=0.25,
        engine_args={"structured_outputs_config": CLOSED},
    ) as vlm:
        yield vlm


def test_a_model_class_comes_back_as_an_instance(strict_vlm: EdgeVLM, photo: np.ndarray) -> None:
    result = strict_vlm.query(photo, "The door?", json_schema=Door, max_tokens=100)
    assert isinstance(result.parsed, Door)
    assert result.finish_reason == "stop"
    assert json.loads(result.text) == result.parsed.model_dump()
    warm = strict_vlm.query(
        photo, "The door?", json_schema=Door, max_tokens=100, temperature=2.0, seed=5
    )
    assert isinstance(warm.parsed, Door)


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": ["left", "right"]},
        {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
        {
            "type": "object",
            "properties": {"label": {"type": "string", "maxLength": 8}},
            "required": ["label"],
        },
        {"type": "integer", "minimum": 3, "maximum": 17},
    ],
)
def test_answers_follow_their_schema(strict_vlm: EdgeVLM, schema: dict[str, Any]) -> None:
    result = strict_vlm.query(None, "x", json_schema=schema, max_tokens=100)
    jsonschema.validate(result.parsed, schema)


def test_an_answer_cut_off_keeps_its_text(strict_vlm: EdgeVLM) -> None:
    with pytest.raises(GenerationError, match="max_tokens") as caught:
        strict_vlm.query(None, "x", json_schema=Door, max_tokens=4)
    assert caught.value.partial.startswith("{")


# What xgrammar leaves out in silence is among them.
REFUSED = [
    {"type": "nonsense"},
    {"$ref": "#/$defs/missing"},
    {"type": "integer", "minimum": 5, "maximum": 1},
    {"type": "string", "pattern": "^[a-"},
    {"type": "string", "pattern": "^(?=a)b$"},
    {"not": {"type": "integer"}},
    {"type": "object", "if": {"required": ["a"]}, "then": {"required": ["b"]}},
    {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
]


@pytest.mark.parametrize("schema", REFUSED)
def test_a_schema_that_cannot_be_honoured_is_refused_before_the_call(
    strict_vlm: EdgeVLM, stub_vlm: EdgeVLM, schema: dict[str, Any]
) -> None:
    for vlm in (strict_vlm, stub_vlm):
        with pytest.raises(SamplingError, match="cannot honour"):
            vlm.query(None, "x", json_schema=schema)
        assert vlm.state == "ready"


def test_requests_with_and_without_a_schema_run_together(strict_vlm: EdgeVLM) -> None:
    plain = strict_vlm.stream(None, "x")
    strict = strict_vlm.stream(None, "x", json_schema=Door, max_tokens=100)
    assert isinstance(strict.result().parsed, Door)
    assert plain.result().text == TEXT


def test_pointing_runs_on_the_real_engine(strict_vlm: EdgeVLM, photo: np.ndarray) -> None:
    found = strict_vlm.point(photo, ["mug", "spoon"])
    assert [one.text for one in found] == [TEXT, TEXT]
    assert [one.points for one in found] == [(), ()]
    counted = strict_vlm.count(photo, "mugs")
    assert (counted.number, counted.how) == (None, "unread")
