"""Prove on the user's own device and vLLM build that Molmo's answers are right.

A small seeded checkpoint (of Molmo 1: real vision tower, two layers of language model) is answered
by the float32 reference implementation and by the engine; tokens and log-probabilities are
compared.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from molmo_edge.checkpoint_files import read_config
from molmo_edge.engine.build import quiet
from molmo_edge.engine.vllm_args import require_vllm
from molmo_edge.errors import ConfigError
from molmo_edge.files import scratch
from molmo_edge.images import ImageLimits
from molmo_edge.interface import Turn
from molmo_edge.models.registry import family_of
from molmo_edge.requests import question, read_turns
from molmo_edge.results import first_difference
from molmo_edge.video import Video, VideoLimits, load_video

Messages = Sequence[Mapping[str, Any]]  # as `EdgeVLM.chat` takes them
Requests = Mapping[str, Messages]
Family = Literal["molmo", "molmo2"]

LAYOUTS: Mapping[Family, tuple[str, ...]] = {"molmo": ("7b-d", "7b-o"), "molmo2": ("4b", "o-7b")}

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
    """One comparison."""

    name: str
    prompt_equal: bool  # whether the prompt's tokens are the reference's
    tokens_equal: bool  # whether all generated tokens are
    first_different: int | None  # index of the first token that is not
    # Largest difference of the log-probability of the same token, up to the first different one;
    # None where that is the first of all.
    max_dlogprob: float | None
    ok: bool  # the verdict


@dataclass(frozen=True)
class Report:
    """All comparisons of one model."""

    cases: tuple[Case, ...]
    environment: Mapping[str, Any]
    family: Family  # whose reference implementation
    stock: bool  # whether this is vLLM's own model
    exact: bool  # whether equality is required, rather than drift below `bound`
    bound: float

    @property
    def ok(self) -> bool:
        """Whether every case is right."""
        return all(case.ok for case in self.cases)


@dataclass(frozen=True)
class Answer:
    """One answer of the reference implementation or of an engine."""

    prompt: list[int]
    token_ids: list[int]
    logprobs: list[float]  # of `token_ids`
    forced: list[float]  # of the reference's tokens, forced one after another


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


def default_requests(family: Family) -> dict[str, Messages]:
    """The cases of `verify`: images of four shapes and none; for Molmo 2 what else it takes."""
    images = {name: synthetic_image(h, w, i) for i, (name, h, w) in enumerate(SIZES)}
    small, *others = images.values()
    out = {name: question(image, QUESTION) for name, image in images.items()}
    if family == "molmo2":
        frames = np.stack([np.roll(small, 11 * i, axis=1) for i in range(5)])
        video = Video(frames, timestamps=[0.0, 0.5, 1.0, 1.5, 1.9])
        first, second = question(small, QUESTION), question(others[1], "And in this one?")
        answer = {"role": "assistant", "content": "A cup."}
        out = {
            "small": out["small"],
            "7 crops": out["13 crops"],
            "3 images": question([small, *others[:2]], "Compare the images."),
            "video": question(None, "What happens?", video),
            "two turns": [*first, answer, *second],
        }
    return {**out, "text only": question(None, QUESTION)}


def verify(
    model: Path | None = None,
    *,
    family: Family | None = None,
    layout: str | None = None,
    dtype: str = "float32",
    kv_cache_dtype: str = "auto",
    stock: bool = False,
    requests: Requests | None = None,
    max_tokens: int = 12,
    engine_args: Mapping[str, Any] | None = None,
) -> Iterator[Report]:
    """Yield the report on molmo_edge's model, and with `stock` one on vLLM's own.

    Args:
        model: a checkpoint directory; None writes a small seeded one.
        family, layout: of the small one; the layout (`LAYOUTS`) implies the family, and by default
            is its first.
        dtype, kv_cache_dtype: of the engine. Equality is required in float32 with an unquantised
            KV cache; otherwise the reference's tokens are forced and the drift of their
            log-probabilities must stay below `DRIFT_BOUND`.
        requests: name → messages; by default `default_requests`.
        engine_args: further settings of `EdgeVLM`, of which vLLM's own model gets the backends.

    Raises:
        ConfigError: an unknown layout, or one of another family.
        ModelError: the checkpoint is missing, broken or of another layout.
        EngineStartError: vLLM cannot run this combination.
    """
    if max_tokens < 1:
        raise ConfigError("max_tokens must be at least 1.")
    require_vllm()
    quiet()
    settings = {"precision": "bf16", **(engine_args or {})}
    eight_bit = kv_cache_dtype != "auto" or settings["precision"] != "bf16"
    exact = dtype == "float32" and not eight_bit
    bound = max(DRIFT_BOUND.get(dtype, EXACT_BOUND), DRIFT_BOUND["fp8"] if eight_bit else 0.0)
    with scratch(Path(tempfile.gettempdir())) as work:
        directory, family = _checkpoint(model, family, layout, work)
        settings["max_crops"] = default_crops(directory)
        requests = default_requests(family) if requests is None else requests
        expected = reference_answers(directory, requests, max_tokens)
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
            return Report(tuple(cases), environment, family, stock, exact, bound)

        answers, environment = _engine_answers(directory, requests, expected, {**settings, **args})
        yield report(answers, stock=False)
        if stock:
            backends = ("attention_backend", "mm_encoder_attn_backend")
            args |= {name: settings[name] for name in backends if settings.get(name)}
            # In a process of its own, as there is one vLLM engine per process.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                answers = pool.submit(_stock_answers, directory, requests, expected, args).result()
            yield report(answers, stock=True)


def _checkpoint(
    model: Path | None, family: Family | None, layout: str | None, work: Path
) -> tuple[Path, Family]:
    """Return a checkpoint directory, written into `work` if none is given, and its family."""
    if model is not None:
        config = read_config(model)
        family_of(config).check(config, model, "auto")
        stated = config["model_type"]
        if stated not in LAYOUTS or family not in (None, stated):
            raise ConfigError(
                f"'{model}' is of the family {stated}; verify has a reference implementation of "
                f"{' and '.join(LAYOUTS)}, and the family asked for is {family or 'any'}."
            )
        return model, stated
    layout = layout or LAYOUTS[family or "molmo"][0]
    of = [name for name, layouts in LAYOUTS.items() if layout in layouts]
    if not of or family not in (None, *of):
        known = "; ".join(f"{name}: {', '.join(layouts)}" for name, layouts in LAYOUTS.items())
        raise ConfigError(f"Layout '{layout}' is not one of {family or 'any family'}. {known}.")
    from molmo_edge.models.molmo import synthetic as molmo
    from molmo_edge.models.molmo2 import synthetic as molmo2

    module: Any = {"molmo": molmo, "molmo2": molmo2}[of[0]]
    return module.write_checkpoint(work, module.hub_config(layout)), of[0]


def default_crops(directory: Path) -> int:
    """The checkpoint's own `max_crops`, whatever the environment sets."""
    return family_of(read_config(directory)).default_crops(directory)


def _turns(messages: Messages) -> list[Turn]:
    return read_turns(messages, ImageLimits(), lambda video: load_video(video, VideoLimits()))


def reference_answers(directory: Path, requests: Requests, max_tokens: int) -> dict[str, Answer]:
    """Answer each request with the reference implementation of the checkpoint's family."""
    from molmo_edge.reference.molmo import ReferenceMolmo
    from molmo_edge.reference.molmo2 import ReferenceMolmo2
    from molmo_edge.reference.molmo2_inputs import Molmo2Processor
    from molmo_edge.reference.molmo_inputs import MolmoProcessor

    molmo2 = read_config(directory)["model_type"] == "molmo2"
    model: Any = (ReferenceMolmo2 if molmo2 else ReferenceMolmo).load(directory)
    processor: Any = (Molmo2Processor if molmo2 else MolmoProcessor)(directory)
    out = {}
    for name, messages in requests.items():
        turns = _turns(messages)
        images = [np.asarray(image) for turn in turns for image in turn.images]
        if molmo2:
            clips = [(turn.video.frames, turn.video.times) for turn in turns if turn.video]
            said = [(turn.role, turn.text) for turn in turns]
            prompt, inputs = processor(said, images, clips[0] if clips else None)
        else:
            [turn] = turns
            prompt, inputs = processor(turn.text, images, default_crops(directory))
        answer = model.generate(prompt, inputs, max_tokens=max_tokens, stop_ids=processor.stop_ids)
        out[name] = Answer(prompt, answer.token_ids, answer.logprobs, answer.logprobs)
    return out


def _engine_answers(
    directory: Path, requests: Requests, expected: Mapping[str, Answer], settings: Mapping[str, Any]
) -> tuple[dict[str, Answer], Mapping[str, Any]]:
    from molmo_edge.vlm import EdgeVLM

    answers = {}
    # The forced tokens share their prompt, whose images need to be encoded only once.
    with EdgeVLM(directory, enable_prefix_caching=True, **settings) as vlm:
        for name, messages in requests.items():
            tokens = expected[name].token_ids
            result = vlm.chat(messages, max_tokens=len(tokens), logprobs=1)
            score = vlm.score(None, messages, tokens)
            answers[name] = Answer(
                list(score.prompt_token_ids),
                list(result.token_ids),
                list(result.logprobs or ()),
                list(score.logprobs),
            )
        return answers, vlm.environment


def _stock_answers(
    directory: Path, requests: Requests, expected: Mapping[str, Answer], args: Mapping[str, Any]
) -> dict[str, Answer]:
    """Answers of vLLM's own model and attention, as its users call it: with text and images.

    For Molmo 2 only the checkpoint's own processor code is replaced; see `reference.stock`.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # this process is the engine's
    from vllm import LLM, SamplingParams

    from molmo_edge.models.molmo import family as molmo
    from molmo_edge.models.molmo2 import family as molmo2

    turns = {name: _turns(messages) for name, messages in requests.items()}
    if read_config(directory)["model_type"] == "molmo2":
        from molmo_edge.reference.stock import register

        molmo2.register()
        register()
        architecture, prompt_of = molmo2.STOCK_ARCHITECTURE, _molmo2_stock_prompt
        images = max(len(t.images) for turns in turns.values() for t in turns)
        # Otherwise vLLM refuses to start with a video's tokens on a GPU.
        args = {**args, "max_num_batched_tokens": args["max_model_len"]}
        limits = {"image": max(1, images), "video": 1}
    else:
        molmo.register()
        architecture, prompt_of = molmo.STOCK_ARCHITECTURE, _molmo_stock_prompt
        limits = {"image": 1}
    llm = LLM(
        str(directory),
        hf_overrides={"architectures": [architecture]},
        limit_mm_per_prompt=limits,
        kv_cache_memory_bytes=2**28,
        gpu_memory_utilization=0.3,  # a shared GPU may have no more free; the cache is set above
        enable_prefix_caching=False,
        enforce_eager=True,
        **args,
    )
    answers = {}
    for name, conversation in turns.items():
        want = expected[name]
        params = SamplingParams(temperature=0.0, max_tokens=len(want.token_ids), logprobs=1)
        output = llm.generate(prompt_of(conversation), params, use_tqdm=False)[0]
        one = output.outputs[0]
        logprobs = [
            entry[token].logprob for token, entry in zip(one.token_ids, one.logprobs, strict=True)
        ]
        # Its own tokens instead of forced ones: they are equal or the case fails in float32.
        forced = (logprobs + [float("nan")] * len(want.token_ids))[: len(want.token_ids)]
        answers[name] = Answer(list(output.prompt_token_ids), list(one.token_ids), logprobs, forced)
    return answers


def _molmo_stock_prompt(turns: Sequence[Turn]) -> dict[str, Any]:
    prompt: dict[str, Any] = {"prompt": f"User: {turns[0].text} Assistant:"}
    if turns[0].images:
        prompt["multi_modal_data"] = {"image": turns[0].images[0]}
    return prompt


def _molmo2_stock_prompt(turns: Sequence[Turn]) -> dict[str, Any]:
    """The chat template's text, and the images or the video."""
    from molmo_edge.reference.molmo2_inputs import chat_text

    text = chat_text([(turn.role, turn.text) for turn in turns])
    images = [image for turn in turns for image in turn.images]
    clips = [turn.video for turn in turns if turn.video is not None]
    if clips:
        fps = 1000.0  # its frames' times are index / fps
        metadata = {
            "fps": fps,
            "frames_indices": [seconds * fps for seconds in clips[0].times],
            "total_num_frames": len(clips[0].frames),
            "do_sample_frames": False,
        }
        data: dict[str, Any] = {"video": [(np.stack(clips[0].frames), metadata)]}
        return {"prompt": f"<|video|>{text}", "multi_modal_data": data}
    if not images:
        return {"prompt": text}
    titles = [f"Image {i + 1}" if len(images) > 1 else "" for i in range(len(images))]
    text = "".join(f"{title}<|image|>" for title in titles) + text
    return {"prompt": text, "multi_modal_data": {"image": images}}


def compare(name: str, want: Answer, got: Answer, exact: bool, bound: float) -> Case:
    """Compare one answer with the reference's: for equality, or for drift of forced tokens."""
    different = first_difference(want.token_ids, got.token_ids)
    if exact:
        pairs = list(zip(want.logprobs, got.logprobs, strict=False))[:different]
    else:
        pairs = list(zip(want.forced, got.forced, strict=True))
    # NaN is the largest, and below no bound.
    differences = sorted((abs(a - b) for a, b in pairs), key=lambda d: (math.isnan(d), d))
    delta = differences[-1] if differences else None
    prompt_equal = want.prompt == got.prompt
    ok = prompt_equal and (different is None or not exact) and delta is not None and delta <= bound
    return Case(name, prompt_equal, different is None, different, delta, ok)
