"""Whether vLLM can honour a JSON Schema, found out in the caller's thread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from molmo_edge.errors import SamplingError


def check_schema(engine: Any, schema: Mapping[str, Any]) -> None:
    """Raises SamplingError when the engine's structured outputs cannot hold to `schema`.

    vLLM compiles every grammar of a process's engine with the backend of the first one. In its
    ``auto`` mode a schema that xgrammar cannot do would be chosen for another backend, and then be
    compiled by xgrammar all the same, which leaves out what it does not know: so it is refused.
    An engine that is not vLLM's takes every schema.
    """
    llm = getattr(engine, "llm", None)
    if llm is None:
        return
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    config = llm.llm_engine.vllm_config
    params = SamplingParams(structured_outputs=StructuredOutputsParams(json=dict(schema)))
    try:
        params._validate_structured_outputs(
            config.model_config, config.structured_outputs_config, llm.get_tokenizer()
        )
    except Exception as exc:  # of vLLM, or of the backend's compiler
        raise SamplingError(
            "vLLM's structured outputs cannot honour this json_schema; the chained error says why."
        ) from exc
    chosen = params.structured_outputs._backend
    if config.structured_outputs_config.backend == "auto" and chosen != "xgrammar":
        raise SamplingError(
            "xgrammar, vLLM's usual backend of structured outputs, does not know every keyword of "
            "this json_schema (such as multipleOf, uniqueItems, or pattern beside a length). Leave "
            "them out, or build EdgeVLM with engine_args={'structured_outputs_config': "
            "{'backend': 'guidance'}}."
        )
