"""Proof, on the user's own device and vLLM build, that Molmo's answers are right.

A small seeded checkpoint (real vision tower, two layers of language model) is answered by the
float32 yardstick of `molmo.reference` and by the engine; tokens and log-probabilities are compared.
Knows nothing of terminals: `molmo-edge verify` prints what is returned here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from molmo_edge.errors import ConfigError
from molmo_edge.images import ImageLike
from molmo_edge.molmo.layout import check_layout, read_config

Array = npt.NDArray[np.uint8]

# Float32 agrees to rounding: 6e-6 was measured, 1e-4 leaves room for other kernels.
EXACT_BOUND = 1e-4
# Largest drift of a teacher-forced log-probability that is not a defect, by what rounds:
# three decimal digits of bfloat16, two of an 8-bit KV cache, two of 8-bit weights.
DRIFT_BOUND: Mapping[str, float] = {"bfloat16": 0.25, "float16": 0.1, "fp8": 0.5}

QUESTION = "What is in the picture?"
# (name, height, width): one crop and less, wide, tall, and twelve crops with the global view.
PICTURES = (("small", 90, 120), ("wide", 224, 900), ("tall", 700, 150), ("13 crops", 900, 1200))


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        prompt_equal: whether the prompt's tokens are the yardstick's.
        tokens_equal: whether all generated tokens are.
        first_different: index of the first token that is not, None when all are equal.
        max_dlogprob: largest difference of the log-probability of the same token, up to the first
            different one.
        ok: the verdict.
    """

    name: str
    prompt_equal: bool
    tokens_equal: bool
    first_different: int | None
    max_dlogprob: float
    ok: bool


@dataclass(frozen=True)
class Report:
    """All comparisons of one model.

    Attributes:
        stock: whether this is vLLM's own model.
        exact: whether equality is asked for, rather than drift below `bound`.
    """

    cases: tuple[Case, ...]
    environment: Mapping[str, Any]
    stock: bool
    exact: bool
    bound: float

    @property
    def ok(self) -> bool:
        """Whether every case is right."""
        return all(case.ok for case in self.cases)


def picture(height: int, width: int, seed: int) -> Array:
    """A seeded picture with edges, gradients and texture, (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    waves = [
        127 + 90 * np.sin(x / rng.uniform(5, 60) + y / rng.uniform(5, 60) + rng.uniform(0, 6))
        for _ in range(3)
    ]
    image = np.stack(waves, axis=-1)
    for _ in range(6):
        top, left = rng.integers(0, height), rng.integers(0, width)
        image[top : top + height // 3, left : left + width // 3] = rng.integers(0, 256, 3)
    image += rng.normal(0, 8, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def default_pictures(seed: int = 0) -> dict[str, ImageLike | None]:
    """The cases of `verify`: four shapes of picture, and none."""
    made: dict[str, ImageLike | None] = {
        name: picture(h, w, seed + i) for i, (name, h, w) in enumerate(PICTURES)
    }
    return {**made, "text only": None}


def verify(
    model: Path | None = None,
    *,
    layout: Literal["7b-d", "7b-o"] = "7b-d",
    dtype: str = "float32",
    kv_cache_dtype: str = "auto",
    stock: bool = False,
    pictures: Mapping[str, ImageLike | None] | None = None,
    max_tokens: int = 12,
    seed: int = 0,
    engine_args: Mapping[str, Any] | None = None,
) -> Iterator[Report]:
    """Yields the report on our model, and with `stock` one on vLLM's own.

    Args:
        model: a checkpoint folder; None writes the small seeded one of `layout`.
        dtype, kv_cache_dtype: of the engine. Equality is asked for in float32 with an unquantised
            KV cache; otherwise the yardstick's tokens are forced and the drift of their
            log-probabilities must stay below `DRIFT_BOUND`.
        pictures: name → picture, or None for text alone.

    Raises:
        ModelError: the checkpoint is missing, broken or of another layout.
        EngineStartError: vLLM cannot run this combination.
    """
    if max_tokens < 1:
        raise ConfigError("max_tokens must be at least 1.")
    pictures = default_pictures(seed) if pictures is None else pictures
    with _checkpoint(model, layout, seed) as folder:
        check_layout(read_config(folder))
        expected = _reference(folder, pictures, max_tokens)
        for is_stock in (False, True) if stock else (False,):
            yield _compare(
                folder,
                pictures,
                expected,
                stock=is_stock,
                dtype=dtype,
                kv_cache_dtype=kv_cache_dtype,
                engine_args=engine_args or {},
            )


@dataclass(frozen=True)
class _Expected:
    prompt: list[int]
    token_ids: list[int]
    logprobs: list[float]


@contextmanager
def _checkpoint(model: Path | None, layout: str, seed: int) -> Iterator[Path]:
    if model is not None:
        yield model
        return
    import torch

    from molmo_edge.molmo.synthetic import write_checkpoint

    with tempfile.TemporaryDirectory(prefix="molmo-edge-verify-") as folder:
        family: Any = {"7b-d": "molmo-d", "7b-o": "molmo-o"}[layout]
        # bfloat16 on disk loads as the same float32 values on both sides, at half the size.
        yield write_checkpoint(Path(folder), family, seed=seed, dtype=torch.bfloat16)


def _reference(
    folder: Path, pictures: Mapping[str, ImageLike | None], max_tokens: int
) -> dict[str, _Expected]:
    from molmo_edge.images import load, to_array
    from molmo_edge.molmo import reference
    from molmo_edge.molmo.layout import ImageTokenIds
    from molmo_edge.molmo.prompts import PromptEncoder

    tokenizer = _tokenizer(folder)
    encoder = PromptEncoder(tokenizer, 2**20)
    # Written out here on purpose: what the engine's own prompt code is compared with.
    text_ids = tokenizer.encode(f" User: {QUESTION} Assistant:", add_special_tokens=False)
    ids = ImageTokenIds.from_vocab(tokenizer.get_vocab())
    special = reference.SpecialTokens(
        im_start=ids.start, im_end=ids.end, im_patch=ids.patch, im_col=ids.col
    )
    model = reference.ReferenceMolmo.load(folder)
    out = {}
    for name, image in pictures.items():
        inputs = None
        if image is not None:
            inputs = reference.preprocess(to_array(load(image)), special)
        prompt = reference.sequence(inputs, text_ids, encoder.bos)
        answer = model.generate(
            prompt, inputs, max_tokens=max_tokens, stop_ids={int(tokenizer.eos_token_id)}
        )
        out[name] = _Expected(
            [int(i) for i in prompt], list(answer.token_ids), list(answer.logprobs)
        )
    return out


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
