"""An engine that has what `Engine` asks for, and nothing else, works with all of EdgeVLM."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from molmo_edge import EdgeVLM, Request
from molmo_edge.errors import ConfigError, EngineClosedError, InputError, SamplingError
from molmo_edge.interface import Engine, EngineInfo, Rendered, Turn, Update
from molmo_edge.sampling import Sampling
from tests.engine.support import FOREVER, eventually

pytestmark = pytest.mark.timeout(30)
IMAGE = np.zeros((8, 8, 3), np.uint8)


class Spelling:
    """Answers every question with its own text in JSON, a character per step."""

    def __init__(self) -> None:
        self.info = EngineInfo(max_model_len=4096)
        self.left: dict[str, tuple[str, Sampling, int]] = {}
        self.calls: list[str] = []

    def render(self, turns: Sequence[Turn], options: Mapping[str, Any]) -> Rendered:
        return Rendered(f'"{turns[-1].text}"')

    def check_schema(self, schema: Mapping[str, Any]) -> None:
        if schema.get("type") == "nonsense":
            raise SamplingError("nonsense is no type.")
        if "crash" in schema:
            raise ValueError("a parser's own error")

    def add(self, request_id: str, rendered: Rendered, sampling: Sampling) -> None:
        self.left[request_id] = rendered.prompt, sampling, sampling.max_tokens

    def step(self) -> list[Update]:
        updates = []
        for request_id, (text, sampling, tokens) in list(self.left.items()):
            more = text[1:] or (text if sampling.ignore_eos else "")
            self.left[request_id] = more, sampling, tokens - 1
            reason = "stop" if not more else "length" if tokens == 1 else None
            if reason is not None:
                del self.left[request_id]
            updates.append(Update(request_id, text[0], (1,), finish_reason=reason))
        return updates

    def abort(self, request_ids: Sequence[str]) -> None:
        self.calls.append("abort")
        for request_id in request_ids:
            self.left.pop(request_id, None)

    def reset_caches(self) -> None:
        self.calls.append("reset_caches")

    def close(self) -> None:
        self.calls.append("close")


def test_a_custom_engine_works_everywhere() -> None:
    engine = Spelling()
    _: Engine = engine
    with EdgeVLM(engine=lambda: engine, max_num_seqs=2) as vlm:
        result = vlm.query(IMAGE, "hello")
        assert result.text == '"hello"' and result.logprobs is None
        assert result.metrics.prompt_tokens is None and result.metrics.output_tokens == 7
        stream = vlm.stream(None, "ab")
        assert "".join(stream) == '"ab"' and stream.prompt_token_ids is None
        assert asyncio.run(vlm.aquery(None, "a")).text == '"a"'
        assert vlm.point(IMAGE, "mug").count == 0
        vlm.stream(None, "endless", **FOREVER).cancel()
        eventually(lambda: not engine.left)
        schemas = [{"type": "nonsense"}, {"crash": True}, {"type": "string"}]
        requests = [Request(None, "a", json_schema=schema) for schema in schemas]
        results = vlm.batch(requests, return_exceptions=True)
        assert [type(r) for r in results[:2]] == [SamplingError, InputError]
        assert "parser" not in str(results[1]) and str(results[2]) == '"a"'
        vlm.reset_caches()
        assert len(vlm.warmup(tokens=2, max_rounds=2).steps) == 4
        with pytest.raises(ConfigError, match="checkpoint"):
            vlm.plan()
    assert engine.calls[-2:] == ["reset_caches", "close"]
    with pytest.raises(EngineClosedError):
        vlm.query(None, "late")
