"""What differs between the versions of vLLM that molmo_edge runs on (0.26 and 0.32), in one place.

Told apart by what they have, not by their number: a vendor's build of one may carry parts of the
other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TOKENS_HOOK = "_apply_hf_processor_tokens_only"


def adapted(processor: type[Any]) -> type[Any]:
    """A multimodal processor written for vLLM 0.32's hooks, for whichever vLLM is installed.

    0.32 calls it for the pictures (`_call_hf_processor`, `_postprocess_hf_mm_data`) and for a
    prompt's token ids (`_postprocess_prompt`), each on its own, and puts the picture's tokens into
    the prompt itself. 0.26 calls one hook for text and pictures together, another for token ids,
    and asks whether the picture's tokens are in the prompt already.
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
                data = self._postprocess_hf_mm_data(mm_data, mm_kwargs, data)
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
