"""Whether vLLM can honour a JSON Schema, found out in the caller's thread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from molmo_edge.errors import SamplingError


def check_schema(engine: Any, schema: Mapping[str, Any]) -> None:
    """Raises SamplingError when the engine's structured outputs cannot hold to `schema`.

    An engine compiles every grammar with the backend of its first one, and xgrammar leaves out in
    silence what it does not know (``not``, ``if``, look-ahead). So a schema is refused unless the
    configured backend takes it and llguidance, which refuses what it does not know, does too.
    An engine that is not vLLM's takes every schema.
    """
    llm = getattr(engine, "llm", None)
    if llm is None:
        return
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams
    from vllm.v1.structured_output.backend_guidance import validate_guidance_grammar

    config = llm.llm_engine.vllm_config
    params = SamplingParams(structured_outputs=StructuredOutputsParams(json=dict(schema)))
    backend = config.structured_outputs_config.backend
    try:
        params._validate_structured_outputs(
            config.model_config, config.structured_outputs_config, llm.get_tokenizer()
        )
        if backend != "guidance":
            validate_guidance_grammar(params)
    except Exception as exc:  # of vLLM, or of a backend's compiler
        raise _refused(backend) from exc
    if backend == "auto" and params.structured_outputs._backend != "xgrammar":
        raise _refused(backend)


def _refused(backend: str) -> SamplingError:
    hint = (
        ""
        if backend == "guidance"
        else ", or build EdgeVLM with engine_args={'structured_outputs_config': {'backend': "
        "'guidance'}}, which knows more of them"
    )
    return SamplingError(
        "vLLM's structured outputs cannot honour this json_schema; the chained error, if there is "
        f"one, says which part. Leave that keyword out{hint}."
    )
