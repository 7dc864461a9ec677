"""What a step brought for a request, straight from vLLM's state of it.

vLLM would make a RequestOutput for each token, to be taken apart again here. That costs more than
all else between its step and the reader, since after a model's weights nothing is in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.engine.output_processor import RequestState

from molmo_edge.interface import Update


class ReportingState(RequestState):  # type: ignore[misc]
    """A request whose outputs, in what `LLMEngine.step` returns, are updates."""

    def make_request_output(
        self,
        new_token_ids: Sequence[int],
        pooling_output: object,
        finish_reason: object | None,
        *_: object,
        **__: object,
    ) -> Update:
        """Called by vLLM after each step that brought this request something."""
        logprobs = top = None
        entries = self.logprobs_processor.logprobs
        if entries is not None:
            entries = entries[len(entries) - len(new_token_ids) :]
            # vLLM puts the chosen token first, then the most likely ones.
            logprobs = [e[token].logprob for token, e in zip(new_token_ids, entries, strict=True)]
            top = [{token: one.logprob for token, one in e.items()} for e in entries]
        ended = finish_reason is not None
        return Update(
            self.external_req_id,
            self.detokenizer.get_next_output_text(ended, True),
            new_token_ids,
            logprobs,
            top,
            str(finish_reason) if ended else None,
            self.num_cached_tokens,
        )


def report(engine: Any, internal_id: str) -> None:
    """Has a request that was just added report its progress as updates.

    Args:
        engine: vLLM's LLMEngine.
        internal_id: what its `add_request` returned.
    """
    engine.output_processor.request_states[internal_id].__class__ = ReportingState
