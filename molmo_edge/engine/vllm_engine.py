"""The real engine: `vllm.LLM` in the calling thread, behind the seam of `engine/seam.py`."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from molmo_edge.engine.heap import trim
from molmo_edge.engine.structured import check_schema
from molmo_edge.interface import EngineInfo, Rendered, Renderer, Turn, Update
from molmo_edge.sampling import Sampling

# vLLM keeps the forward context, the parallel groups and more in globals of the process, so engines
# in one process take turns, and only the last one to close may tear the groups down.
PROCESS_LOCK = threading.RLock()
_alive = 0


class VllmEngine:
    """Adds, steps and aborts in the thread that built it.

    Args:
        llm: a `vllm.LLM` whose engine core runs in this thread.
        renderer: the model family's.
        info: what to tell about it.
    """

    _turn: AbstractContextManager[object] = PROCESS_LOCK

    def __init__(self, llm: Any, renderer: Renderer, info: EngineInfo) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        from molmo_edge.engine.updates import report

        self.llm = llm
        self.info = info
        self._engine = llm.llm_engine
        self._renderer = renderer
        self._params = SamplingParams
        self._delta = RequestOutputKind.DELTA
        self._structured = StructuredOutputsParams
        self._report = report
        self._settle()

    def render(self, turns: Sequence[Turn], options: Mapping[str, Any]) -> Rendered:
        return self._renderer.render(turns, options)

    def check_schema(self, schema: Mapping[str, Any]) -> None:
        check_schema(self, schema)

    def add(self, request_id: str, rendered: Rendered, sampling: Sampling) -> None:
        schema = sampling.json_schema
        params = self._params(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            stop=list(sampling.stop) or None,
            logprobs=sampling.logprobs,
            logprob_token_ids=list(sampling.logprob_token_ids) or None,
            ignore_eos=sampling.ignore_eos,
            structured_outputs=None if schema is None else self._structured(json=dict(schema)),
            output_kind=self._delta,
        )
        with self._turn:
            try:
                internal_id = self._engine.add_request(request_id, rendered.prompt, params)
                self._report(self._engine, internal_id)
            except BaseException:
                # The half that turns tokens into text may know it already.
                self._engine.abort_request([request_id])
                raise

    def step(self) -> list[Update]:
        with self._turn:
            updates: list[Update] = self._engine.step()
        return updates

    def abort(self, request_ids: Sequence[str]) -> None:
        with self._turn:
            self._engine.abort_request(list(request_ids))

    def reset_caches(self) -> None:
        """Empties prefix, multimodal and encoder caches."""
        with self._turn:
            self._engine.reset_prefix_cache()
            self._engine.reset_mm_cache()
            self._engine.reset_encoder_cache()

    def close(self) -> None:
        engine, self._engine, self.llm = self._engine, None, None
        self._renderer = _Closed()
        with PROCESS_LOCK:
            self._shut_down(engine)
            engine.renderer.shutdown()
            del engine
        trim()

    # What an engine that shares this process must mind.

    def _settle(self) -> None:
        global _alive
        with PROCESS_LOCK:
            _alive += 1

    def _shut_down(self, engine: Any) -> None:
        global _alive
        _alive -= 1
        with _groups_kept() if _alive else nullcontext():
            engine.engine_core.shutdown()


@contextmanager
def _groups_kept() -> Iterator[None]:
    """Keeps what the engines of this process share while one of them shuts down."""
    from vllm.v1.engine import core

    cleanup = core.cleanup_dist_env_and_memory
    core.cleanup_dist_env_and_memory = lambda *args, **kwargs: None
    try:
        yield
    finally:
        core.cleanup_dist_env_and_memory = cleanup


class _Closed:
    def render(self, turns: Any, options: Mapping[str, Any]) -> Rendered:
        from molmo_edge.errors import EngineClosedError

        raise EngineClosedError("The engine is closed; an engine cannot be reopened.")
