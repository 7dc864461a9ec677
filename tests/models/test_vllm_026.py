"""vLLM's versions told apart by what they have, on doubles of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from molmo_edge.models.vllm_026 import adapted


class Tokenizer:
    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(letter) for letter in text]


class Info:
    def get_tokenizer(self) -> Tokenizer:
        return Tokenizer()


class Base32:
    """What both versions have."""

    info = Info()


class Base26(Base32):
    def _apply_hf_processor_tokens_only(self, prompt_tokens: list[int]) -> list[int]:
        return prompt_tokens

    def _hf_processor_applies_updates(self, **kwargs: object) -> bool:
        return True


class Hooks:
    """A processor written for 0.32."""

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]) -> Any:
        from transformers import BatchFeature

        return BatchFeature({"images": hf_data["images"], "crops": hf_kwargs["max_crops"]})

    def _postprocess_hf_mm_data(self, hf_data: Any, hf_kwargs: Any, processed_data: Any) -> Any:
        processed_data["num_crops"] = len(processed_data["images"])
        return processed_data

    def _postprocess_prompt(self, prompt: list[int]) -> list[int]:
        return prompt if prompt[:1] == [1] else [1, *prompt]


class For32(Hooks, Base32):
    pass


class For26(Hooks, Base26):
    pass


def test_a_new_vllm_gets_the_processor_as_it_is() -> None:
    assert adapted(For32) is For32


def test_an_old_vllm_gets_text_and_images_from_one_hook() -> None:
    processor = adapted(For26)()
    data = processor._call_hf_processor(
        prompt="ab", mm_data={"images": [7, 8]}, mm_kwargs={"max_crops": 3}, tok_kwargs={}
    )
    assert data["input_ids"] == [[1, 97, 98]]
    assert (data["images"], data["crops"], data["num_crops"]) == ([7, 8], 3, 2)


def test_an_old_vllm_asks_for_text_alone_too() -> None:
    processor = adapted(For26)()
    data = processor._call_hf_processor(prompt="", mm_data={}, mm_kwargs={}, tok_kwargs={})
    assert dict(data) == {"input_ids": [[1]]}


def test_token_ids_are_finished_once_and_images_are_vllms_to_place() -> None:
    processor = adapted(For26)()
    assert processor._apply_hf_processor_tokens_only([5]) == [1, 5]
    assert processor._apply_hf_processor_tokens_only([1, 5]) == [1, 5]
    assert not processor._hf_processor_applies_updates(prompt_text="", mm_items=None)
