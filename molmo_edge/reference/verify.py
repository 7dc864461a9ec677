"""Proof, on the user's own device and vLLM build, that Molmo's answers are right.

A small seeded checkpoint (real vision tower, two layers of language model) is answered by the
float32 yardstick of `molmo.reference` and by the engine; tokens and log-probabilities are compared.
Knows nothing of terminals: `molmo-edge verify` prints what is returned here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from molmo_edge.engine.build import quiet, require_vllm
from molmo_edge.errors import ConfigError
from molmo_edge.images import ImageLike
from molmo_edge.models.molmo.layout import check_layout, read_config

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
    require_vllm()
    quiet()
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

    from molmo_edge.models.molmo.synthetic import write_checkpoint

    with tempfile.TemporaryDirectory(prefix="molmo-edge-verify-") as folder:
        family: Any = {"7b-d": "molmo-d", "7b-o": "molmo-o"}[layout]
        # bfloat16 on disk loads as the same float32 values on both sides, at half the size.
        yield write_checkpoint(Path(folder), family, seed=seed, dtype=torch.bfloat16)


def _reference(
    folder: Path, pictures: Mapping[str, ImageLike | None], max_tokens: int
) -> dict[str, _Expected]:
    from molmo_edge.images import load, to_array
    from molmo_edge.models.molmo.layout import ImageTokenIds
    from molmo_edge.models.molmo.prompts import PromptEncoder
    from molmo_edge.reference import molmo as reference

    tokenizer = _tokenizer(folder)
    encoder = PromptEncoder(tokenizer, 2**20)
    # Written out here on purpose: what the engine's own prompt code is compared with.
    text_ids = tokenizer.encode(f" User: {QUESTION} Assistant:", add_special_tokens=False)
    ids = ImageTokenIds.from_vocab(tokenizer.get_vocab())
    special = reference.SpecialTokens(ids.start, ids.end, ids.patch, ids.col)
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

    from molmo_edge.vllm_plugin import register_with_transformers

    register_with_transformers()
    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)


@dataclass(frozen=True)
class _Answer:
    prompt: list[int]
    token_ids: list[int]
    logprobs: list[float]
    # Log-probabilities of the yardstick's tokens, forced one after another.
    forced: list[float]


def _compare(
    folder: Path,
    pictures: Mapping[str, ImageLike | None],
    expected: Mapping[str, _Expected],
    *,
    stock: bool,
    dtype: str,
    kv_cache_dtype: str,
    engine_args: Mapping[str, Any],
) -> Report:
    answers, environment = _answers(
        folder, pictures, expected, stock, dtype, kv_cache_dtype, engine_args
    )
    exact = dtype == "float32" and kv_cache_dtype == "auto" and "precision" not in engine_args
    bound = EXACT_BOUND if exact else max(
        DRIFT_BOUND.get(dtype, 0.0),
        DRIFT_BOUND["fp8"] if kv_cache_dtype != "auto" or "precision" in engine_args else 0.0,
    )
    cases = tuple(
        _case(name, expected[name], answers[name], exact, bound) for name in pictures
    )
    return Report(cases, environment, stock, exact, bound)


def _case(name: str, want: _Expected, got: _Answer, exact: bool, bound: float) -> Case:
    different = next(
        (i for i, (a, b) in enumerate(zip(want.token_ids, got.token_ids, strict=False)) if a != b),
        None,
    )
    if different is None and len(want.token_ids) != len(got.token_ids):
        different = min(len(want.token_ids), len(got.token_ids))
    if exact:
        pairs = list(zip(want.logprobs, got.logprobs, strict=False))[:different]
    else:
        pairs = list(zip(want.logprobs, got.forced, strict=True))
    delta = max((abs(a - b) for a, b in pairs), default=0.0)
    prompt_equal = want.prompt == got.prompt
    # NaN is below no bound.
    ok = prompt_equal and (different is None or not exact) and delta <= bound
    return Case(name, prompt_equal, different is None, different, delta, ok)


def _answers(
    folder: Path,
    pictures: Mapping[str, ImageLike | None],
    expected: Mapping[str, _Expected],
    stock: bool,
    dtype: str,
    kv_cache_dtype: str,
    engine_args: Mapping[str, Any],
) -> tuple[dict[str, _Answer], Mapping[str, Any]]:
    """What the engine says, ours through `EdgeVLM`, vLLM's own as its users call it."""
    from molmo_edge import vllm_plugin as plugin
    from molmo_edge.vlm import EdgeVLM

    longest = max(len(e.prompt) + len(e.token_ids) for e in expected.values())
    with ExitStack() as stack:
        if stock:
            plugin.use_model(stock=True)
            stack.callback(plugin.use_model, stock=False)
            # vLLM remembers the model class by the folder's name.
            folder = _other_name(folder, stack)
        with EdgeVLM(
            folder,
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            # One request at a time, and room for vLLM's own worst-case picture.
            max_model_len=max(2048, longest + 1),
            max_num_seqs=1,
            # The forced tokens share their prompt, and its picture runs through the tower once.
            enable_prefix_caching=not stock,
            **{"precision": "bf16", **engine_args},
        ) as vlm:
            environment = vlm.environment
            ask = _ask_stock if stock else _ask_ours
            answers = {
                name: ask(vlm, image, expected[name]) for name, image in pictures.items()
            }
    return answers, environment


def _other_name(folder: Path, stack: ExitStack) -> Path:
    link = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "stock"
    link.symlink_to(folder.absolute(), target_is_directory=True)
    return link


def _ask_ours(vlm: Any, image: ImageLike | None, want: _Expected) -> _Answer:
    result = vlm.query(image, QUESTION, max_tokens=len(want.token_ids), logprobs=1)
    scored = vlm.score(image, QUESTION, want.token_ids)
    return _Answer(
        list(scored.prompt_token_ids),
        list(result.token_ids),
        list(result.logprobs),
        list(scored.logprobs),
    )


def _ask_stock(vlm: Any, image: ImageLike | None, want: _Expected) -> _Answer:
    from vllm import SamplingParams

    from molmo_edge.images import load

    prompt: dict[str, Any] = {"prompt": f"User: {QUESTION} Assistant:"}
    if image is not None:
        prompt["multi_modal_data"] = {"image": load(image)}

    def ask(engine: Any) -> _Answer:
        params = SamplingParams(temperature=0.0, max_tokens=len(want.token_ids), logprobs=1)
        output = engine.llm.generate(prompt, params, use_tqdm=False)[0]
        one = output.outputs[0]
        logprobs = [
            entry[token].logprob for token, entry in zip(one.token_ids, one.logprobs, strict=True)
        ]
        # Its own tokens stand in for the forced ones: stock is compared in float32 as it answers.
        padded = (logprobs + [float("nan")] * len(want.token_ids))[: len(want.token_ids)]
        return _Answer(list(output.prompt_token_ids), list(one.token_ids), logprobs, padded)

    return vlm.in_engine_thread(ask)  # type: ignore[no-any-return]
