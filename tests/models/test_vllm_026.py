"""vLLM's versions told apart by what they have, on doubles of both."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from transformers import BatchFeature

from molmo_edge.models.vllm_026 import adapted


class For32:
    """A processor written for vLLM 0.32."""

    info = SimpleNamespace(
        get_tokenizer=lambda: SimpleNamespace(
            encode=lambda text, add_special_tokens: [ord(letter) for letter in text]
        )
    )

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]) -> Any:
        return BatchFeature({"images": hf_data["images"], "crops": hf_kwargs["max_crops"]})

    def _postprocess_prompt(self, prompt: list[int]) -> list[int]:
        return prompt if prompt[:1] == [1] else [1, *prompt]


class For26(For32):
    """The same over a base class of vLLM 0.26."""

    def _apply_hf_processor_tokens_only(self, prompt_tokens: list[int]) -> list[int]:
        return prompt_tokens


def test_a_new_vllm_gets_the_processor_as_it_is() -> None:
    assert adapted(For32) is For32


def test_an_old_vllm_gets_text_and_images_from_one_hook() -> None:
    processor = adapted(For26)()
    data = processor._call_hf_processor(
        prompt="ab", mm_data={"images": [7]}, mm_kwargs={"max_crops": 3}, tok_kwargs={}
    )
    assert dict(data) == {"input_ids": [[1, 97, 98]], "images": [7], "crops": 3}
    data = processor._call_hf_processor(prompt="", mm_data={}, mm_kwargs={}, tok_kwargs={})
    assert dict(data) == {"input_ids": [[1]]}
    assert processor._apply_hf_processor_tokens_only([5]) == [1, 5]
    assert not processor._hf_processor_applies_updates(prompt_text="", mm_items=None)
