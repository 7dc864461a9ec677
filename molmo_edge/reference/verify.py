"""Prove on the user's own device and vLLM build that Molmo's answers are right.

A small seeded checkpoint (real vision tower, two layers of language model) is answered by the
float32 reference implementation and by the engine; tokens and log-probabilities are compared.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from molmo_edge.checkpoint_files import read_config
from molmo_edge.engine.build import quiet
from molmo_edge.engine.vllm_args import require_vllm
from molmo_edge.errors import ConfigError
from molmo_edge.images import ImageLike, load
from molmo_edge.models.molmo.config import Layout, check_layout
from molmo_edge.results import first_difference

Images = Mapping[str, ImageLike | None]

# Float32 agrees to rounding: 6e-6 was measured, 1e-4 leaves room for other kernels.
EXACT_BOUND = 1e-4
# Largest drift of a teacher-forced log-probability that is not a defect, by what rounds:
# three decimal digits of bfloat16, two of an 8-bit KV cache, two of 8-bit weights.
DRIFT_BOUND: Mapping[str, float] = {"bfloat16": 0.25, "float16": 0.1, "fp8": 0.5}

QUESTION = "What is in the image?"
# (name, height, width): one crop and less, wide, tall, and twelve crops with the global view.
SIZES = (("small", 90, 120), ("wide", 224, 900), ("tall", 700, 150), ("13 crops", 900, 1200))


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        prompt_equal: whether the prompt's tokens are the reference's.
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
        exact: whether equality is required, rather than drift below `bound`.
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


@dataclass(frozen=True)
class Answer:
    """One answer of the reference implementation or of an engine.

    Attributes:
        prompt, token_ids, logprobs: token ids, and log-probabilities of the generated ones.
        forced: log-probabilities of the reference's tokens, forced one after another.
    """

    prompt: list[int]
    token_ids: list[int]
    logprobs: list[float]
    forced: list[float]


def synthetic_image(height: int, width: int, seed: int) -> npt.NDArray[np.uint8]:
    """A seeded image with edges, gradients and texture, (height, width, 3) uint8."""
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


def default_images() -> dict[str, ImageLike | None]:
    """The cases of `verify`: four shapes of image, and none."""
    images = {name: synthetic_image(h, w, i) for i, (name, h, w) in enumerate(SIZES)}
    return {**images, "text only": None}


def verify(
    model: Path | None = None,
    *,
    layout: Layout = "7b-d",
    dtype: str = "float32",
    kv_cache_dtype: str = "auto",
    stock: bool = False,
    images: Images | None = None,
    max_tokens: int = 12,
    engine_args: Mapping[str, Any] | None = None,
) -> Iterator[Report]:
    """Yield the report on molmo_edge's model, and with `stock` one on vLLM's own.

    Args:
        model: a checkpoint directory; None writes the small seeded one of `layout`.
        dtype, kv_cache_dtype: of the engine. Equality is required in float32 with an unquantised
            KV cache; otherwise the reference's tokens are forced and the drift of their
            log-probabilities must stay below `DRIFT_BOUND`.
        images: name → image, or None for text only.
        engine_args: further settings of `EdgeVLM`, of which vLLM's own model gets the backends.

    Raises:
        ModelError: the checkpoint is missing, broken or of another layout.
        EngineStartError: vLLM cannot run this combination.
    """
    if max_tokens < 1:
        raise ConfigError("max_tokens must be at least 1.")
    require_vllm()
    quiet()
    images = default_images() if images is None else images
    settings = {"precision": "bf16", **(engine_args or {})}
    eight_bit = kv_cache_dtype != "auto" or settings["precision"] != "bf16"
    exact = dtype == "float32" and not eight_bit
    bound = max(DRIFT_BOUND.get(dtype, EXACT_BOUND), DRIFT_BOUND["fp8"] if eight_bit else 0.0)
    with tempfile.TemporaryDirectory(prefix="molmo-edge-verify-") as work:
        directory = model
        if directory is None:
            from molmo_edge.models.molmo.synthetic import hub_config, write_checkpoint

            directory = write_checkpoint(Path(work), hub_config(layout))
        check_layout(read_config(directory))
        expected = reference_answers(directory, images, max_tokens)
        longest = max(len(e.prompt) + len(e.token_ids) for e in expected.values())
        # One request at a time, and room for vLLM's own worst-case image.
        args = {
            "max_model_len": max(2048, longest + 1),
            "max_num_seqs": 1,
            "dtype": dtype,
            "kv_cache_dtype": kv_cache_dtype,
        }

        def report(answers: Mapping[str, Answer], stock: bool) -> Report:
            cases = (compare(n, expected[n], answers[n], exact, bound) for n in answers)
            return Report(tuple(cases), environment, stock, exact, bound)

        answers, environment = _engine_answers(directory, images, expected, {**settings, **args})
        yield report(answers, stock=False)
        if stock:
            backends = ("attention_backend", "mm_encoder_attn_backend")
            args |= {name: settings[name] for name in backends if settings.get(name)}
            # In a process of its own, as there is one vLLM engine per process.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                answers = pool.submit(_stock_answers, directory, images, expected, args).result()
            yield report(answers, stock=True)


def reference_answers(directory: Path, images: Images, max_tokens: int) -> dict[str, Answer]:
    from molmo_edge.models.molmo.hf import load_tokenizer
    from molmo_edge.models.molmo.prompts import ImageTokenIds, bos_id
    from molmo_edge.reference.molmo import ReferenceMolmo
    from molmo_edge.reference.molmo_inputs import preprocess, sequence

    tokenizer = load_tokenizer(directory)
    ids = ImageTokenIds.from_vocab(tokenizer.get_vocab())
    # Written out, because the engine's own prompt code is compared with it.
    text_ids = tokenizer.encode(f" User: {QUESTION} Assistant:", add_special_tokens=False)
    stop_ids = {int(tokenizer.eos_token_id)}
    model = ReferenceMolmo.load(directory)
    out = {}
    for name, image in images.items():
        inputs = None if image is None else preprocess(np.asarray(load(image)), ids)
        prompt = sequence(inputs, text_ids, bos_id(tokenizer))
        answer = model.generate(prompt, inputs, max_tokens=max_tokens, stop_ids=stop_ids)
        out[name] = Answer(prompt.tolist(), answer.token_ids, answer.logprobs, answer.logprobs)
    return out


def _engine_answers(
    directory: Path,
    images: Images,
    expected: Mapping[str, Answer],
    settings: Mapping[str, Any],
) -> tuple[dict[str, Answer], Mapping[str, Any]]:
    from molmo_edge.vlm import EdgeVLM

    answers = {}
    # The forced tokens share their prompt, whose image needs to be encoded only once.
    with EdgeVLM(directory, enable_prefix_caching=True, **settings) as vlm:
        for name, image in images.items():
            tokens = expected[name].token_ids
            result = vlm.query(image, QUESTION, max_tokens=len(tokens), logprobs=1)
            score = vlm.score(image, QUESTION, tokens)
            answers[name] = Answer(
                list(score.prompt_token_ids),
                list(result.token_ids),
                list(result.logprobs or ()),
                list(score.logprobs),
            )
        return answers, vlm.environment


def _stock_answers(
    directory: Path, images: Images, expected: Mapping[str, Answer], args: Mapping[str, Any]
) -> dict[str, Answer]:
    """Answers of vLLM's own Molmo, as its users call it."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # this process is the engine's
    from vllm import LLM, SamplingParams

    from molmo_edge.models.molmo.family import STOCK_ARCHITECTURE, register

    register()
    llm = LLM(
        str(directory),
        hf_overrides={"architectures": [STOCK_ARCHITECTURE]},
        limit_mm_per_prompt={"image": 1},
        kv_cache_memory_bytes=2**28,
        gpu_memory_utilization=0.3,  # a shared GPU may have no more free; the cache is set above
        enable_prefix_caching=False,
        enforce_eager=True,
        **args,
    )
    answers = {}
    for name, image in images.items():
        want = expected[name]
        prompt: dict[str, Any] = {"prompt": f"User: {QUESTION} Assistant:"}
        if image is not None:
            prompt["multi_modal_data"] = {"image": load(image)}
        params = SamplingParams(temperature=0.0, max_tokens=len(want.token_ids), logprobs=1)
        output = llm.generate(prompt, params, use_tqdm=False)[0]
        one = output.outputs[0]
        logprobs = [
            entry[token].logprob for token, entry in zip(one.token_ids, one.logprobs, strict=True)
        ]
        # Its own tokens instead of forced ones: they are equal or the case fails in float32.
        forced = (logprobs + [float("nan")] * len(want.token_ids))[: len(want.token_ids)]
        answers[name] = Answer(list(output.prompt_token_ids), list(one.token_ids), logprobs, forced)
    return answers


def compare(name: str, want: Answer, got: Answer, exact: bool, bound: float) -> Case:
    """Compare one answer with the reference's: for equality, or for drift of forced tokens."""
    different = first_difference(want.token_ids, got.token_ids)
    if exact:
        pairs = list(zip(want.logprobs, got.logprobs, strict=False))[:different]
    else:
        pairs = list(zip(want.forced, got.forced, strict=True))
    delta = max((abs(a - b) for a, b in pairs), default=0.0)
    prompt_equal = want.prompt == got.prompt
    # NaN is below no bound.
    ok = prompt_equal and (different is None or not exact) and delta <= bound
    return Case(name, prompt_equal, different is None, different, delta, ok)
