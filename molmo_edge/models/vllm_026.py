"""Support for vLLM 0.26, which one GPU check of `benchmarks/` runs on; everything else is 0.30+.

Recognised by its hooks, not by its number: a vendor's build may carry parts of another version.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TOKENS_HOOK = "_apply_hf_processor_tokens_only"


def adapted(processor: type[Any]) -> type[Any]:
    """Adapt a multimodal processor, written for the hooks of vLLM 0.32, to the installed vLLM.

    0.32 calls it for images (`_call_hf_processor`) and for a prompt's token ids
    (`_postprocess_prompt`) separately, and inserts the image tokens into the prompt itself. 0.26
    calls one hook for text and images together and another for token ids, and asks whether the
    image tokens are in the prompt already.
    """
    if not hasattr(processor, _TOKENS_HOOK):
        return processor

    class Adapted(processor):  # type: ignore[misc]
        """The hooks of vLLM 0.26 over those of 0.32."""

        def _call_hf_processor(
            self,
            prompt: str,
            mm_data: Mapping[str, object],
            mm_kwargs: Mapping[str, object],
            tok_kwargs: Mapping[str, object],
        ) -> Any:
            from transformers import BatchFeature

            data = BatchFeature({})
            if mm_data:
                data = super()._call_hf_processor(mm_data, mm_kwargs)
            tokenizer = self.info.get_tokenizer()
            ids = tokenizer.encode(prompt, add_special_tokens=False)
            data["input_ids"] = [self._postprocess_prompt(ids)]
            return data

        def _hf_processor_applies_updates(self, *args: object, **kwargs: object) -> bool:
            return False

        def _apply_hf_processor_tokens_only(self, prompt_tokens: list[int]) -> list[int]:
            ids: list[int] = self._postprocess_prompt(prompt_tokens)
            return ids

    Adapted.__name__ = processor.__name__
    Adapted.__qualname__ = processor.__qualname__
    return Adapted
