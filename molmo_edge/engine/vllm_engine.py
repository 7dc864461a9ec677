"""`engine="thread"`: `vllm.LLM` with its core in the calling thread, behind `Engine`."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from molmo_edge.errors import ConfigError, EngineClosedError, SamplingError
from molmo_edge.interface import EngineInfo, Rendered, Renderer, Turn, Update
from molmo_edge.models.drafter import expect_json
from molmo_edge.models.nan import nan_token
from molmo_edge.models.vllm_workarounds import llvmlite_hidden
from molmo_edge.sampling import Sampling

# vLLM keeps the forward context and the parallel groups in globals of the process. Held from the
# start of an engine's construction to the end of its close.
_ONLY_ENGINE = threading.Lock()
# Held while the environment differs from the user's.
_ENVIRONMENT = threading.Lock()


def _new_lock() -> None:
    """A child forked during a start would wait for ever for its parent's lock."""
    global _ENVIRONMENT
    _ENVIRONMENT = threading.Lock()


os.register_at_fork(after_in_child=_new_lock)


def start(args: Mapping[str, Any]) -> VllmEngine:
    """Build `vllm.LLM` in the calling thread. Raises ConfigError while there is another one."""
    if not _ONLY_ENGINE.acquire(blocking=False):
        raise ConfigError(
            "This process already runs a vLLM engine, and vLLM supports one per process. Close "
            'the first EdgeVLM, or build this one with engine="process".'
        )
    try:
        from vllm import LLM
        from vllm.platforms import current_platform

        hidden = llvmlite_hidden() if current_platform.is_cpu() else nullcontext()
        with environment({"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}), hidden:
            llm = LLM(**args)
        return VllmEngine(llm, llm.llm_engine)
    except BaseException:
        _ONLY_ENGINE.release()
        raise


class VllmEngine:
    """Renders in any thread; adds, steps and aborts in the thread that built it.

    Attributes:
        llm: the `vllm.LLM`, None after `close`.
        core: its `LLMEngine`, None after `close`.
        speculative: whether tokens are drafted.
        info, renderer: set by `build`.
    """

    info: EngineInfo
    renderer: Renderer | None = None

    def __init__(self, llm: Any, core: Any) -> None:
        self.llm = llm
        self.core = core
        self._nan_token = nan_token(core.model_config.hf_config)
        self.speculative = core.vllm_config.speculative_config is not None

    def render(self, turns: Sequence[Turn], options: Mapping[str, Any]) -> Rendered:
        return self._open_renderer().render(turns, options)

    def encode(self, answer: str) -> list[int]:
        return self._open_renderer().encode(answer)

    def _open_renderer(self) -> Renderer:
        renderer = self.renderer
        if renderer is None:
            raise EngineClosedError("The engine is closed; an engine cannot be reopened.")
        return renderer

    def check_schema(self, schema: Mapping[str, Any]) -> None:
        """Raise SamplingError unless the configured backend and llguidance accept the schema.

        xgrammar ignores keywords that it does not know (``not``, ``if``, look-ahead) and llguidance
        refuses them, so it always has a say. With backend ``auto`` an engine compiles every grammar
        with the backend of its first, so a schema must not need vLLM's fallbacks.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        config = self.core.vllm_config.structured_outputs_config
        params = SamplingParams(structured_outputs=StructuredOutputsParams(json=dict(schema)))
        with _schema_refused(config.backend):
            params.verify(self.core.model_config, None, config, self.core.get_tokenizer())
        if config.backend != "guidance":
            refuse_schema(schema, config.backend)

    def add(self, request_id: str, rendered: Rendered, sampling: Sampling) -> None:
        try:
            if self.speculative and sampling.json_schema is not None:
                expect_json(rendered.prompt["prompt_token_ids"], sampling.json_schema)
            params = sampling_params(sampling, self.speculative)
            self.core.add_request(request_id, engine_prompt(rendered), params)
        except BaseException:
            # vLLM's detokenizer may know the request already.
            self.core.abort_request([request_id])
            raise

    def step(self) -> list[Update]:
        return [self.to_update(output) for output in self.core.step()]

    def abort(self, request_ids: Sequence[str]) -> None:
        self.core.abort_request(list(request_ids))

    def reset_caches(self) -> None:
        self.core.reset_prefix_cache()
        self.core.reset_mm_cache()
        self.core.reset_encoder_cache()

    def to_update(self, output: Any) -> Update:
        """Convert vLLM's RequestOutput of one request, with deltas; NaN is a log-probability."""
        (completion,) = output.outputs
        logprobs = top_logprobs = None
        if self._nan_token in completion.token_ids:
            logprobs = [math.nan]
        elif completion.logprobs is not None:
            flat = completion.logprobs
            spans = map(slice, flat.start_indices, flat.end_indices)
            # vLLM puts the chosen token first, then the most likely ones.
            top_logprobs = [
                dict(zip(flat.token_ids[s], flat.logprobs[s], strict=True)) for s in spans
            ]
            pairs = zip(completion.token_ids, top_logprobs, strict=True)
            logprobs = [top[token] for token, top in pairs]
        return Update(
            output.request_id,
            completion.text,
            completion.token_ids,
            logprobs,
            top_logprobs,
            completion.finish_reason,
            output.num_cached_tokens,
            completion.stop_reason if isinstance(completion.stop_reason, str) else None,
        )

    def close(self) -> None:
        core, self.core, self.llm, self.renderer = self.core, None, None, None
        try:
            core.engine_core.shutdown()
            core.renderer.shutdown()
            del core
            release_memory()
        finally:
            _ONLY_ENGINE.release()


def refuse_schema(schema: Mapping[str, Any], backend: str = "guidance") -> None:
    """Raise SamplingError for a schema that the grammar compilers refuse; needs no engine."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams
    from vllm.v1.structured_output.backend_guidance import validate_guidance_grammar
    from vllm.v1.structured_output.backend_xgrammar import validate_xgrammar_grammar

    with _schema_refused(backend):
        params = SamplingParams(structured_outputs=StructuredOutputsParams(json=dict(schema)))
        if backend == "auto":
            validate_xgrammar_grammar(params)
        validate_guidance_grammar(params)


@contextmanager
def _schema_refused(backend: str) -> Iterator[None]:
    try:
        yield
    except Exception as exc:  # vLLM's, or the grammar compiler's
        raise SamplingError(
            "vLLM's structured outputs cannot honour this json_schema; the chained exception "
            "names the part. Remove that keyword"
            + ("." if backend == "guidance" else ", or use the backend 'guidance'.")
        ) from exc


def engine_prompt(rendered: Rendered) -> Any:
    """Return vLLM's prompt, the tokens of `answer` included."""
    if not rendered.answer:
        return rendered.prompt
    ids = [*rendered.prompt["prompt_token_ids"], *rendered.answer]
    return {**rendered.prompt, "prompt_token_ids": ids}


def sampling_params(sampling: Sampling, speculative: bool) -> Any:
    """Return vLLM's SamplingParams; `speculative`: whether the engine drafts tokens."""
    from vllm import SamplingParams
    from vllm.platforms import current_platform
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    if speculative and sampling.temperature > 0 and current_platform.is_cpu():
        # vLLM 0.32's CPU kernel leaves the temperatures of drafted tokens undefined, for all
        # requests of the step; a test says when this can go.
        raise SamplingError(
            "vLLM's CPU backend cannot sample while tokens are drafted: use temperature 0, or "
            "an engine with speculation=off."
        )
    schema = sampling.json_schema
    scored = list(sampling.logprob_token_ids) or None
    # An engine that drafts ignores `logprob_token_ids`: then the whole vocabulary is scored.
    every = speculative and scored is not None
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        stop=list(sampling.stop) or None,
        logprobs=-1 if every else sampling.logprobs,
        logprob_token_ids=None if every else scored,
        flat_logprobs=True,
        detokenize=not every,
        ignore_eos=sampling.ignore_eos,
        skip_reading_prefix_cache=not sampling.reuse_prefix,
        structured_outputs=None if schema is None else StructuredOutputsParams(json=dict(schema)),
        output_kind=RequestOutputKind.DELTA,
    )


def release_memory() -> None:
    """Free reference cycles, and have glibc return freed memory to the system.

    glibc keeps gigabytes otherwise, which other programs, or a GPU that shares the memory, need.
    """
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Change environment variables while vLLM starts, whatever the user set for other engines."""
    from vllm import envs

    with _ENVIRONMENT:
        before = {name: os.environ.get(name) for name in values}
        os.environ.update(values)
        # vLLM caches what it read once an engine is up.
        envs.disable_envs_cache()
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
            envs.disable_envs_cache()
            envs.enable_envs_cache()
