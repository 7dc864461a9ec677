"""The real engine: `vllm.LLM` in the calling thread, behind the seam of `engine/seam.py`."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import Any

from molmo_edge.engine.seam import EngineInfo, Rendered, Turn, Update
from molmo_edge.families import Renderer
from molmo_edge.sampling import Sampling


class VllmEngine:
    """Adds, steps and aborts in the thread that built it.

    Args:
        llm: a `vllm.LLM` whose engine core runs in this thread.
        renderer: the model family's.
        info: what to tell about it.
    """

    def __init__(self, llm: Any, renderer: Renderer, info: EngineInfo) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        self.llm = llm
        self.info = info
        self._engine = llm.llm_engine
        self._renderer = renderer
        self._params = SamplingParams
        self._delta = RequestOutputKind.DELTA
        self._structured = StructuredOutputsParams

    def render(self, turns: Sequence[Turn], options: Mapping[str, Any]) -> Rendered:
        return self._renderer.render(turns, options)

    def add(self, request_id: str, rendered: Rendered, sampling: Sampling) -> None:
        schema = sampling.json_schema
        params = self._params(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            stop=list(sampling.stop) or None,
            logprobs=sampling.logprobs,
            ignore_eos=sampling.ignore_eos,
            structured_outputs=None if schema is None else self._structured(json=dict(schema)),
            output_kind=self._delta,
        )
        self._engine.add_request(request_id, rendered.prompt, params)

    def step(self) -> list[Update]:
        return [_update(output) for output in self._engine.step()]

    def abort(self, request_ids: Sequence[str]) -> None:
        self._engine.abort_request(list(request_ids))

    def reset_caches(self) -> None:
        """Empties prefix, multimodal and encoder caches."""
        self._engine.reset_prefix_cache()
        self._engine.reset_mm_cache()
        self._engine.reset_encoder_cache()

    def close(self) -> None:
        engine, self._engine, self.llm = self._engine, None, None
        self._renderer = _Closed()
        engine.engine_core.shutdown()
        engine.renderer.shutdown()
        del engine
        gc.collect()


class _Closed:
    def render(self, turns: Any, options: Mapping[str, Any]) -> Rendered:
        from molmo_edge.errors import EngineClosedError

        raise EngineClosedError("The engine is closed; an engine cannot be reopened.")


def _update(output: Any) -> Update:
    one = output.outputs[0]
    logprobs = top = None
    if one.logprobs is not None:
        # vLLM puts the chosen token first, then the most likely ones.
        logprobs = [
            entry[token].logprob for token, entry in zip(one.token_ids, one.logprobs, strict=True)
        ]
        top = [{token: lp.logprob for token, lp in entry.items()} for entry in one.logprobs]
    return Update(
        request_id=output.request_id,
        text=one.text,
        token_ids=one.token_ids,
        logprobs=logprobs,
        top_logprobs=top,
        finish_reason=one.finish_reason,
        cached_tokens=output.num_cached_tokens,
    )
