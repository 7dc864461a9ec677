"""Google's Gemma 3 as model families: vLLM's own model, chat template and image processor.

Images of a turn stand before its text, in order. Gemma 3 has no pointing of its own.
"""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from molmo_edge.errors import ImageError, ModelError, SamplingError
from molmo_edge.interface import ImageAttention, Rendered, Renderer, Resize, Turn
from molmo_edge.models.checkpoint import check_files
from molmo_edge.requests import check_length, check_turns, refuse_special

# Added tokens that users may write: line breaks, spaces, HTML tags. All others are control tokens.
_PLAIN = re.compile(
    r"\s+|▁+|</?(table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|[bius]|sub"
    r"|sup|code)>"
)


class Gemma3:
    """Gemma 3 with vision (4B, 12B, 27B)."""

    name = "gemma3"
    verbs = frozenset({"query", "chat", "choose", "caption", "images"})
    prompts: Mapping[str, str] = {}
    # 256 tokens each; engine_args={"limit_mm_per_prompt": {"image": …}} sets another limit.
    max_images = 16
    crops = False
    image_attention: ImageAttention = "image"
    unquantized: tuple[str, ...] = ("vision_tower.*", "multi_modal_projector.*")

    def check(self, config: Mapping[str, Any], folder: Path, load_format: str) -> None:
        if not all(isinstance(config.get(p), Mapping) for p in ("text_config", "vision_config")):
            raise ModelError("config.json of Gemma 3 must have text_config and vision_config.")
        check_files(config, folder, load_format)

    def default_crops(self, folder: Path) -> int:
        return 1

    def frame_sampling(self, folder: Path) -> None:
        return None

    def engine_args(self, max_crops: int, resize: Resize, max_frames: int) -> dict[str, Any]:
        return {
            "limit_mm_per_prompt": {"image": self.max_images},
            # An image's tokens see each other, so no step may end inside one.
            "disable_chunked_mm_input": True,
        }

    def prepare(self) -> None:
        from vllm import ModelRegistry

        from molmo_edge.models.attention import register as register_attention
        from molmo_edge.models.nan import checked_logits
        from molmo_edge.models.vllm_workarounds import gemma3_without_torchvision

        with gemma3_without_torchvision():
            from vllm.model_executor.models.gemma3_mm import Gemma3ForConditionalGeneration as Stock

        class Model(Stock):  # type: ignore[misc]
            def compute_logits(self, hidden_states: Any) -> Any:
                return checked_logits(super().compute_logits(hidden_states), self.config)

        # The class itself: for a name, vLLM starts one more process to inspect it.
        ModelRegistry.register_model(Stock.__name__, Model)
        register_attention()

    def renderer(self, engine: Any, max_crops: int, resize: Resize) -> Renderer:
        return Gemma3Renderer(engine)


class Gemma3Renderer:
    """Renders for one engine, whose own renderer is used by one thread at a time."""

    def __init__(self, engine: Any) -> None:
        from vllm.renderers.params import ChatParams

        model = engine.model_config
        self._renderer = engine.renderer
        self._tokenizer = engine.get_tokenizer()
        self._max_model_len = int(model.max_model_len)
        self._max_images = int(model.multimodal_config.get_limit_per_prompt("image"))
        self._tokens_per_image = int(model.hf_config.mm_tokens_per_image)
        options = {"add_generation_prompt": True, "tokenize": False}
        self._params = ChatParams(chat_template_kwargs=options)
        self._control = control_tokens(self._tokenizer)
        self._longest_token = max(map(len, self._tokenizer.get_vocab()))
        self._lock = threading.Lock()
        self._number = itertools.count()

    def render(self, turns: Sequence[Turn], options: Mapping[str, Any]) -> Rendered:
        """See `Engine.render`."""
        if options.get("max_crops") is not None:
            raise SamplingError("max_crops means nothing to Gemma 3, whose images have no crops.")
        check_turns(turns)
        n_images = sum(len(turn.images) for turn in turns)
        if n_images > self._max_images:
            raise ImageError(
                f"The conversation has {n_images} images; the engine takes {self._max_images}. "
                "Remove some, or build EdgeVLM with "
                'engine_args={"limit_mm_per_prompt": {"image": …}}.'
            )
        characters = sum(len(turn.text) for turn in turns)
        check_length(characters // self._longest_token, self._max_model_len)
        # The tokenizer and the image processor are not made for several threads.
        with self._lock:
            for turn in turns:
                refuse_special(self._encode(turn.text), self._control)
            _, prompt = self._renderer.render_messages(_messages(turns), self._params)
            tokens: dict[str, Any] = {"prompt_token_ids": self._encode(prompt["prompt"])}
            if images := prompt.get("multi_modal_data"):
                tokens["multi_modal_data"] = images
                if not options.get("reuse_prefix"):  # or vLLM hashes the pixels
                    names = [f"image-{next(self._number)}" for _ in range(n_images)]
                    tokens["multi_modal_uuids"] = {"image": names}
            # Before the pixels are touched: a prompt that does not fit costs nothing.
            total = len(tokens["prompt_token_ids"]) + n_images * self._tokens_per_image
            check_length(total, self._max_model_len, n_images)
            rendered = self._renderer.render_cmpl([tokens])[0]
        places = rendered.get("mm_placeholders", {}).get("image", ())
        ids = rendered["prompt_token_ids"]
        check_length(len(ids), self._max_model_len, n_images)
        # The line breaks between two images are one token, which both placeholders count.
        image_positions = {p.offset + i for p in places for i in range(p.length)}
        return Rendered(rendered, len(ids), len(image_positions), ids)

    def encode(self, answer: str) -> list[int]:
        """See `Renderer.encode`."""
        check_length(len(answer) // self._longest_token, self._max_model_len)
        with self._lock:
            ids = self._encode(answer)
        refuse_special(ids, self._control)
        return ids

    def _encode(self, text: str) -> list[int]:
        encoded = self._tokenizer(text, add_special_tokens=False, verbose=False)
        return [int(i) for i in encoded["input_ids"]]


def control_tokens(tokenizer: Any) -> dict[int, str]:
    """Return the token ids that no user text may produce, with their spelling.

    Gemma 3's files flag few of them as special, and add line breaks and HTML tags in the same way.
    """
    return {
        int(i): str(token)
        for i, token in tokenizer.added_tokens_decoder.items()
        if token.special or not _PLAIN.fullmatch(str(token))
    }


def _messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Chat messages as vLLM expects them."""
    return [
        {
            "role": turn.role,
            "content": [
                *({"type": "image_pil", "image_pil": image} for image in turn.images),
                {"type": "text", "text": turn.text},
            ],
        }
        for turn in turns
    ]
