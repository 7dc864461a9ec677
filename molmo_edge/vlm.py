"""`EdgeVLM`: every method that users call.

A request's way: options and messages are checked, images loaded and the prompt rendered in the
caller's thread; the engine's thread generates; a `Stream` brings the answer back.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
import weakref
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, Unpack, overload

from molmo_edge.checkpoint_files import read_config
from molmo_edge.devices.caches import default_cache_dir
from molmo_edge.devices.detect import DeviceInfo
from molmo_edge.devices.plan import Plan, plan
from molmo_edge.devices.profiles import find_profile
from molmo_edge.devices.shapes import ModelShape
from molmo_edge.engine.build import build, quiet, set_environment
from molmo_edge.engine.loop import EngineLoop, State
from molmo_edge.engine.pending import PendingRequest, timed_out
from molmo_edge.engine.vllm_args import (
    engine_device,
    engine_environment,
    plan_build,
    require_vllm,
)
from molmo_edge.engine.vllm_errors import mapped
from molmo_edge.errors import (
    ConfigError,
    EngineClosedError,
    ImageError,
    MolmoEdgeError,
    PromptError,
)
from molmo_edge.images import ImageLike, ImageLimits
from molmo_edge.interface import PROMPTS, Engine, ModelFamily, Turn
from molmo_edge.models.hub import locate
from molmo_edge.models.registry import family_of
from molmo_edge.points import CountResult, PointResult, TrackResult, parse_points
from molmo_edge.requests import (
    CheckedOptions,
    Images,
    Options,
    Request,
    check_options,
    check_token_ids,
    question,
    read_labels,
    read_turns,
)
from molmo_edge.results import Result, Score
from molmo_edge.settings import EdgeSettings, Resolved, resolve
from molmo_edge.stream import AStream, Stream
from molmo_edge.video import Clip, VideoLike, VideoLimits, load_video
from molmo_edge.warmup import WarmupReport, warm
from molmo_edge.watch import Camera, Seen, Source, arun, run

T = TypeVar("T")

# The prompts Molmo was trained with (PixMo-Cap).
CAPTION_PROMPTS: Mapping[str, str] = {
    "short": "Describe this image in one sentence.",
    "normal": "Describe this image.",
    "long": "Describe this image in detail.",
}


class EdgeVLM:
    """A vision-language model in this process.

    Safe to use from many threads and from asyncio at once: one engine thread serves them all.

    Args:
        model: checkpoint directory, hub name, or ``"stub"`` (the default: real architecture,
            random weights, no download); ``"stub-2"`` is that of Molmo 2.
        config: a TOML file of settings.
        engine: ``"thread"`` (the default) or ``"process"``, the setting of that name; or a callable
            that builds another engine than vLLM's, such as
            `molmo_edge.engine.fake.FakeEngine.factory()`, called in the engine's thread. Model and
            device settings then mean nothing.
        settings: any field of `EdgeSettings`, such as `profile`, `precision`, `max_model_len` and
            `engine_args`; None counts as not given. Arguments override the environment
            (`MOLMO_EDGE_*`), which overrides `.env`, which overrides the config file, which
            overrides the profile.

    Raises:
        ConfigError: a setting is unknown or wrong, or a vLLM engine runs in this process already.
        ModelError: no such checkpoint, or a layout that is not supported.
        MissingDependencyError: vLLM is not installed.
        EngineStartError: vLLM could not be started; the cause is chained.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        config: str | Path | None = None,
        engine: str | Callable[[], Engine] | None = None,
        **settings: Any,
    ) -> None:
        began = time.perf_counter()
        self.device: DeviceInfo = engine_device()
        resolved = resolve(
            {
                "model": None if model is None else str(model),
                "engine": None if callable(engine) else engine,
                **settings,
            },
            config=config,
            profile_settings=self._load_profile,
        )
        self.settings: EdgeSettings = resolved.settings
        self.family: ModelFamily | None = None
        # Sizes of the checkpoint, None for an engine that is not vLLM's.
        self.shape: ModelShape | None = None
        self._max_crops = self.settings.max_crops
        self._limits = ImageLimits(self.settings.max_image_bytes, self.settings.max_image_pixels)
        self._video_limits = VideoLimits(
            self.settings.max_video_bytes,
            self.settings.max_image_pixels,
            self.settings.max_video_s,
            self.settings.max_frames or VideoLimits.max_frames,
        )
        self._factory = engine if callable(engine) else self._vllm_factory(resolved, began)
        self._ids = itertools.count()
        self._closed = False
        self._restarting = threading.Lock()
        self._finalizer: weakref.finalize[..., EdgeVLM] | None = None
        self._start()

    # Questions.

    def query(
        self,
        image: Images | None,
        text: str,
        *,
        video: VideoLike | None = None,
        **options: Unpack[Options],
    ) -> Result:
        """Answer one question about an image, several images, a video, or nothing.

        Args:
            image: bytes, path, PIL image or H x W x 3 uint8 RGB array; a list of them; or None.
            text: the question.
            video: path, bytes or `Video`, in place of images.
            options: see `Options`.

        Raises:
            ConfigError: a video, and the model has no video; see `supports`.
            InputError: refused before it reached the engine; the next call works.
            RequestTimeout: `timeout` passed; its `.partial` has the text so far.
            QueueFull, EngineDeadError, EngineClosedError, EngineForkedError.
        """
        return self.stream(image, text, video=video, **options).result()

    def stream(
        self,
        image: Images | None,
        text: str,
        *,
        video: VideoLike | None = None,
        **options: Unpack[Options],
    ) -> Stream:
        """Like `query`, but return at once with the answer's text as it is generated."""
        return self._open(question(image, text, video), options)

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Unpack[Options]) -> Result:
        """Answer the last message of a conversation.

        Messages are ``{"role": "user", "content": …}``, content being a string or a list of
        ``{"type": "text", "text": …}``, ``{"type": "image", "image": …}`` and
        ``{"type": "video", "video": …}``: images in any of the user's messages, or one video.
        Molmo 1 takes one image, in the first message. Raises as `query`.
        """
        return self.chat_stream(messages, **options).result()

    def chat_stream(
        self, messages: Sequence[Mapping[str, Any]], **options: Unpack[Options]
    ) -> Stream:
        """Like `chat`, but return at once with the answer's text as it is generated."""
        return self._open(messages, options)

    @overload
    def batch(self, requests: Iterable[Request]) -> list[Result]: ...

    @overload
    def batch(
        self, requests: Iterable[Request], *, return_exceptions: bool
    ) -> list[Result | MolmoEdgeError]: ...

    def batch(
        self, requests: Iterable[Request], *, return_exceptions: bool = False
    ) -> list[Result] | list[Result | MolmoEdgeError]:
        """Answer many requests by continuous batching; results in order.

        A request that fails is its own failure: the others finish. Then the first error is raised,
        or with `return_exceptions` errors stand in the list.
        """
        opened: list[Stream | MolmoEdgeError] = []
        results: list[Result | MolmoEdgeError] = []
        with ExitStack() as streams:
            for request in requests:
                try:
                    messages = question(request.image, request.text, request.video)
                    stream = self._open(messages, request.options, wait=True)
                    opened.append(streams.enter_context(stream))
                except MolmoEdgeError as exc:
                    opened.append(exc)
            for one in opened:
                try:
                    results.append(one.result() if isinstance(one, Stream) else one)
                except MolmoEdgeError as exc:
                    results.append(exc)
        return _settle(results, return_exceptions)

    def score(
        self,
        image: Images | None,
        text: str | Sequence[Mapping[str, Any]],
        answer: Sequence[int],
        *,
        video: VideoLike | None = None,
        candidates: Sequence[Sequence[int]] | None = None,
    ) -> Score:
        """Teacher-forced log-probabilities of an answer's tokens; what drift is measured with.

        Each token is one request that follows the tokens before it, so that the KV cache is read as
        in decoding; with `enable_prefix_caching` all but the first cost one token.

        Args:
            text: the question, or a conversation as `chat` takes it; then no image and no video.
            answer: token ids, as in `Result.token_ids`; at least one.
            candidates: for each token of the answer, further token ids to score in its place.

        Raises:
            PromptError: the answer is empty or not token ids, or candidates do not match it.
            As `query`; the first failure ends all.
        """
        ids = check_token_ids(answer)
        others = [check_token_ids(one) for one in candidates or [[] for _ in ids]]
        if not ids or len(others) != len(ids):
            raise PromptError(
                "Give at least one token to score, and candidates for each token or none at all."
            )
        if not isinstance(text, str) and (image is not None or video is not None):
            raise PromptError("A conversation has its images and video in its messages.")
        turns = self._read(question(image, text, video) if isinstance(text, str) else text)
        streams: list[Stream] = []
        with ExitStack() as stack:
            for i, token in enumerate(ids):
                scored = tuple(dict.fromkeys([token, *others[i]]))
                options = CheckedOptions(max_tokens=1, logprob_token_ids=scored)
                stream = self._submit(turns, options, answer=ids[:i], wait=True)
                streams.append(stack.enter_context(stream))
                streams[0].result()  # the others share its prefix
            results = [stream.result() for stream in streams]
        entries = [result.top_logprobs[0] for result in results if result.top_logprobs]
        return Score(
            token_ids=tuple(ids),
            logprobs=tuple(entry[token] for token, entry in zip(ids, entries, strict=True)),
            candidates=tuple(
                {token: entry[token] for token in scored}
                for scored, entry in zip(others, entries, strict=True)
            ),
            prompt_token_ids=streams[0].prompt_token_ids or (),
            # Each request generated one token greedily, which is not among the answer's.
            greedy_token_ids=tuple(result.token_ids[0] for result in results),
        )

    # Questions, for asyncio.

    async def aquery(
        self,
        image: Images | None,
        text: str,
        *,
        video: VideoLike | None = None,
        **options: Unpack[Options],
    ) -> Result:
        """`query` for asyncio; cancelling the task frees the sequence."""
        stream = await self._aopen(question(image, text, video), options)
        return await stream.aresult()

    def astream(
        self,
        image: Images | None,
        text: str,
        *,
        video: VideoLike | None = None,
        **options: Unpack[Options],
    ) -> AStream:
        """`stream` for asyncio: ``async for`` over it, or ``await`` it for the `Stream`."""
        return AStream(lambda: self._aopen(question(image, text, video), options))

    async def abatch(
        self, requests: Iterable[Request], *, return_exceptions: bool = False
    ) -> list[Result] | list[Result | MolmoEdgeError]:
        """`batch` for asyncio; one request at a time is prepared, all others are answered."""
        preparing = asyncio.Lock()

        async def answer(request: Request) -> Result:
            messages = question(request.image, request.text, request.video)
            async with preparing:
                stream = await self._aopen(messages, request.options, wait=True)
            return await stream.aresult()

        results = await asyncio.gather(*map(answer, list(requests)), return_exceptions=True)
        return _settle(results, return_exceptions)

    # Tasks with Molmo's own prompts.

    def supports(self, verb: str) -> bool:
        """Whether the model can do it: query, chat, caption, point, count, track, images, video.

        ``"images"``: several in one request; ``"video"``: the argument of that name.
        """
        return self.family is None or verb in self.family.verbs

    def caption(
        self,
        image: ImageLike,
        length: Literal["short", "normal", "long"] = "normal",
        **options: Unpack[Options],
    ) -> Result:
        """Describe an image. Raises as `query`, and PromptError for another length."""
        self._require("caption")
        if length not in CAPTION_PROMPTS:
            raise PromptError(f"length must be one of {', '.join(CAPTION_PROMPTS)}.")
        return self.query(image, CAPTION_PROMPTS[length], **options)

    @overload
    def point(self, image: Images, label: str, **options: Unpack[Options]) -> PointResult: ...

    @overload
    def point(
        self, image: Images, label: list[str] | tuple[str, ...], **options: Unpack[Options]
    ) -> list[PointResult]: ...

    @overload
    def point(self, *, video: VideoLike, label: str, **options: Unpack[Options]) -> PointResult: ...

    @overload
    def point(
        self, *, video: VideoLike, label: list[str] | tuple[str, ...], **options: Unpack[Options]
    ) -> list[PointResult]: ...

    def point(
        self,
        image: Images | None = None,
        label: str | Sequence[str] = "",
        *,
        video: VideoLike | None = None,
        **options: Unpack[Options],
    ) -> PointResult | list[PointResult]:
        """Point to what a label names; several labels are one batch, answered in order.

        Args:
            image: as in `query`; ``Point.px`` takes its upright size. Of several images, a point's
                `image_index` says in which it is.
            label: "the red mug"; lower-cased and stripped, as in training.
            video: as in `query`; points have `t` and `frame`.

        Returns:
            A `PointResult`; a list of them for a list of labels. An answer cut off by `max_tokens`
            is `truncated` and keeps its complete points.

        Raises:
            ConfigError: the model cannot point; see `supports`.
            PromptError: a label is empty, or contains markup or unprintable characters.
            As `query`; the first failure of a batch ends the others.
        """
        _, answers = self._locate("point", question(image, "", video), label, options)
        return answers[0] if isinstance(label, str) else answers

    def count(
        self,
        image: Images | None = None,
        label: str = "",
        *,
        video: VideoLike | None = None,
        **options: Unpack[Options],
    ) -> CountResult:
        """Count what a label names, by the answer's points where it has any.

        Over all images, or the whole video. Takes and raises what `point` does, for one label.
        """
        _, [answer] = self._locate("count", question(image, "", video), [label], options)
        return CountResult.of(answer)

    def track(self, video: VideoLike, label: str, **options: Unpack[Options]) -> TrackResult:
        """Follow what a label names through a video.

        Args:
            video: as in `query`; the model states positions at its sampled frames.
            label: as in `point`.
            options: see `Options`; `max_tokens` is 2048 unless given.

        Raises:
            As `point`.
        """
        options.setdefault("max_tokens", 2048)
        clip, [answer] = self._locate("track", question(None, "", video), [label], options)
        return TrackResult.of(answer, clip)

    def watch(
        self,
        source: Source,
        question: str = CAPTION_PROMPTS["short"],
        *,
        drop: Literal["oldest", "none"] = "oldest",
        max_fps: float | None = None,
        frame_timeout: float | None = 10.0,
        on_stall: Literal["raise", "reconnect"] = "raise",
        window: int | None = None,
        **options: Unpack[Options],
    ) -> Generator[Seen, None, None]:
        """Ask the same question about a camera's newest frame, again and again.

        Args:
            source: see `molmo_edge.watch.Camera`.
            drop: ``"oldest"``: a frame that arrives while another is answered replaces the one that
                waits; ``"none"``: the source is read only as fast as frames are answered.
            max_fps: maximum number of frames per second, in questions and in a window.
            frame_timeout: seconds without a new frame after which the source has stalled; None
                waits forever.
            on_stall: ``"raise"`` CameraError, or ``"reconnect"``: open the source again, with
                growing pauses, until it delivers.
            window: ask about a video instead: the newest frame and up to ``window - 1`` before it,
                answered or not, at their capture times. At least 2; for what happens rather than
                what is there. Models learned from 2 frames per second: ``max_fps=2``.
            options: see `Options`; a frame that misses its `timeout` is yielded with `error`.

        Returns:
            An iterator of `Seen`, ending where the source ends. Closing or dropping it closes the
            source and joins its thread.

        Raises:
            ConfigError: at once, for a wrong argument, or a window if the model has no video.
            CameraError, MissingDependencyError: while iterating.
            As `query`, while iterating, about the question, the options or the engine.
        """
        camera = Camera(source, drop, max_fps, frame_timeout, on_stall, window)
        self._check_window(window)

        def answer(frame: Seen) -> Result:
            image = frame.image if frame.video is None else None
            return self.query(image, question, video=frame.video, **options)

        return run(camera, answer)

    def awatch(
        self,
        source: Source,
        question: str = CAPTION_PROMPTS["short"],
        *,
        drop: Literal["oldest", "none"] = "oldest",
        max_fps: float | None = None,
        frame_timeout: float | None = 10.0,
        on_stall: Literal["raise", "reconnect"] = "raise",
        window: int | None = None,
        **options: Unpack[Options],
    ) -> AsyncGenerator[Seen, None]:
        """`watch` for asyncio: ``async for`` over it; the event loop is never blocked.

        Leaving the loop early leaves the source open until the iterator is closed: use
        ``contextlib.aclosing`` where that matters.
        """
        camera = Camera(source, drop, max_fps, frame_timeout, on_stall, window)
        self._check_window(window)

        def answer(frame: Seen) -> Awaitable[Result]:
            image = frame.image if frame.video is None else None
            return self.aquery(image, question, video=frame.video, **options)

        return arun(camera, answer)

    # The engine.

    @property
    def state(self) -> State:
        """State of the engine: starting, ready, stalled, closing, closed or dead."""
        return self._loop.state

    @property
    def cause(self) -> BaseException | None:
        """What killed the engine, None while it is not dead."""
        return self._loop.cause

    @property
    def environment(self) -> Mapping[str, Any]:
        """Versions, device and settings that answers come from."""
        return self._loop.engine.info.environment

    @property
    def startup(self) -> Mapping[str, float | None]:
        """Seconds of each part of the start; see `EngineInfo`."""
        return self._loop.engine.info.startup_s

    def plan(self, **request: Any) -> Plan:
        """What this device can do with this checkpoint: memory, and ceilings of its speed.

        Args:
            request: `prompt_tokens`, `output_tokens`, `batch` or `bandwidth_bytes_s` of
                `molmo_edge.devices.plan.plan`.

        Raises:
            ConfigError: a count below 1, or the engine is not vLLM's and has no checkpoint.
        """
        if self.shape is None:
            raise ConfigError("plan() needs a checkpoint, and this engine was built without one.")
        request.setdefault("kv_cache_dtype", self.settings.kv_cache_dtype)
        request.setdefault("batch", self.settings.max_num_seqs)
        return plan(self.shape, self.device, profile=self._profile, **request)

    def warmup(self, *, tokens: int = 32, max_rounds: int = 10) -> WarmupReport:
        """Run the shapes that requests will have, until decode speed is steady.

        After it no request pays for kernels, graphs or caches that the first of its kind needs.

        Args:
            tokens: generated in each request, at least 2; fewer where `max_model_len` is short.
            max_rounds: maximum number of decode speeds to measure, at least 2.

        Raises:
            ConfigError: `tokens` or `max_rounds` is below 2.
            As `query`.
        """
        return warm(self.batch, self.settings, self.family, tokens, max_rounds)

    def reset_caches(self) -> None:
        """Empty prefix, image and encoder caches, between steps."""
        self.in_engine_thread(lambda engine: engine.reset_caches())

    def in_engine_thread(self, function: Callable[[Any], T]) -> T:
        """Run `function(engine)` between steps in the thread that owns the engine.

        For what this class does not offer: ``engine.llm`` is the `vllm.LLM`, or with
        ``engine="process"`` the `AsyncLLM`, whose coroutines ``engine.run`` awaits.
        """
        return self._loop.call(function)

    def restart(self) -> None:
        """Free the engine, dead or alive, and build a new one with the same settings.

        Raises as the constructor; EngineClosedError after `close`.
        """
        self._loop.check_may_wait()
        with self._restarting:
            if not self._closed:
                self._loop.close()
                self._start()
                return
        raise EngineClosedError("The engine is closed; an engine cannot be reopened.")

    def close(self, timeout: float | None = None, *, drain: bool = False) -> bool:
        """End the engine and free its memory; from any thread, any number of times.

        Args:
            timeout: maximum seconds to wait; None for as long as it takes. Signal handlers must
                give one: the engine may wait for the code that they interrupt.
            drain: let requests in flight finish; otherwise they end with EngineClosedError.

        Returns:
            Whether the engine is gone. If False, it ends after its current step.
        """
        self._closed = True
        return self._loop.close(timeout, drain=drain)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # A request's way.

    def _check(self, options: Mapping[str, Any]) -> CheckedOptions:
        """Check the options and that the engine is ready, before any image is loaded."""
        self._loop.check()
        return check_options(options, self._max_crops)

    def _read(self, messages: Sequence[Mapping[str, Any]]) -> list[Turn]:
        return read_turns(messages, self._limits, self._load_clip)

    def _load_clip(self, video: VideoLike) -> Clip:
        self._require("video")
        return load_video(video, self._video_limits)

    def _open(
        self, messages: Sequence[Mapping[str, Any]], options: Options, *, wait: bool = False
    ) -> Stream:
        """Prepare a request in this thread and submit it; `wait` for room in a full queue."""
        checked = self._check(options)
        return self._submit(self._read(messages), checked, wait=wait)

    async def _aopen(
        self, messages: Sequence[Mapping[str, Any]], options: Options, *, wait: bool = False
    ) -> Stream:
        """`_open` for asyncio; the request is prepared in another thread."""
        checked, loop = self._check(options), self._loop

        def prepare() -> PendingRequest:
            return self._render(loop, self._read(messages), checked)

        try:
            async with asyncio.timeout(checked.timeout):
                request = await asyncio.to_thread(prepare)
        except TimeoutError:
            raise timed_out() from None
        stream = Stream(loop, request, checked)
        await loop.async_submit(request, wait=wait)
        return stream

    def _submit(
        self,
        turns: Sequence[Turn],
        options: CheckedOptions,
        *,
        answer: Sequence[int] = (),
        wait: bool = False,
    ) -> Stream:
        loop = self._loop
        request = self._render(loop, turns, options, answer)
        # Before it is submitted, so that Ctrl-C in between leaves nothing in the engine.
        stream = Stream(loop, request, options)
        try:
            loop.submit(request, wait=wait)
        except BaseException:
            stream.cancel()
            raise
        return stream

    def _render(
        self,
        loop: EngineLoop,
        turns: Sequence[Turn],
        options: CheckedOptions,
        answer: Sequence[int] = (),
    ) -> PendingRequest:
        engine = loop.engine
        with mapped("render"):
            if options.json_schema is not None:
                engine.check_schema(options.json_schema)
            rendered = engine.render(turns, {"max_crops": options.max_crops, "answer": answer})
        return PendingRequest(
            f"request-{next(self._ids)}",
            rendered,
            options,
            started=options.started,
            preprocess_s=time.monotonic() - options.started,
            deadline=options.deadline,
            environment=engine.info.environment,
        )

    def _check_window(self, window: int | None) -> None:
        if window is None:
            return
        self._require("video")
        if window > (limit := self._video_limits.max_frames):
            raise ConfigError(f"window must be at most {limit}, the engine's max_frames.")

    def _require(self, verb: str) -> None:
        if self.family is not None and verb not in self.family.verbs:
            raise ConfigError(
                f"This model's family, {self.family.name}, does not support {verb}; it supports "
                f"{', '.join(sorted(self.family.verbs))}. Use a Molmo 2 checkpoint."
            )

    def _locate(
        self,
        verb: str,
        messages: Sequence[Mapping[str, Any]],
        label: str | Sequence[str],
        options: Options,
    ) -> tuple[Clip | None, list[PointResult]]:
        """One request per label, all about the same images or video; the points of each answer.

        Args:
            messages: one message without text.
        """
        self._require(verb)
        labels = read_labels(label)
        checked = self._check(options)
        [turn] = self._read(messages)
        if not turn.images and turn.video is None:
            raise ImageError("There is nothing to look at: give an image, images or a video.")
        own = {} if self.family is None else self.family.prompts
        prompt = {**PROMPTS, **own}[verb]
        streams: list[Stream] = []
        with ExitStack() as stack:
            for one in labels:
                asked = replace(turn, text=prompt.format(one))
                stream = self._submit([asked], checked, wait=len(labels) > 1)
                streams.append(stack.enter_context(stream))
                # Loading images and video belongs to the first request.
                checked = checked.model_copy(update={"started": time.monotonic()})
            results = [stream.result() for stream in streams]
        answers = []
        for one, result in zip(labels, results, strict=True):
            points = parse_points(result.text).placed(turn.images, turn.video)
            truncated = points.truncated or result.finish_reason == "length"
            answers.append(replace(points, truncated=truncated, label=one, result=result))
        return turn.video, answers

    # The engine's start.

    def _load_profile(self, name: str) -> tuple[str, dict[str, Any]]:
        self._profile = find_profile(name, self.device)
        return self._profile.name, self._profile.as_settings()

    def _vllm_factory(self, resolved: Resolved, began: float) -> Callable[[], Engine]:
        require_vllm()
        quiet()
        settings = self.settings
        set_environment(engine_environment(settings, self.device))
        root = settings.cache_dir or default_cache_dir()
        directory = locate(settings.model, root, settings.load_format)
        config = read_config(directory)
        self.family = family_of(config)
        self.family.check(config, directory, settings.load_format)
        build_plan = plan_build(resolved, self.device, self.family, directory, self._profile)
        self.shape = build_plan.shape
        if self.family.crops:
            self._max_crops = build_plan.settings.max_crops
        if sampling := self.family.frame_sampling(directory):
            self._video_limits = replace(
                self._video_limits,
                max_frames=build_plan.settings.max_frames or sampling[0],
                max_fps=sampling[1],
            )
        # A restart finds all of this done.
        config_s = iter([time.perf_counter() - began])
        return lambda: build(build_plan, next(config_s, 0.0))

    def _start(self) -> None:
        loop = self._loop = EngineLoop(
            self._factory, max_queue=self.settings.max_queue, stall_s=self.settings.stall_s
        )
        if self._closed:  # by another thread, which did not see this loop
            loop.close()
        try:
            loop.start()
        except BaseException:
            loop.close(timeout=0)
            raise
        if self._finalizer is not None:
            self._finalizer.detach()
        self._finalizer = weakref.finalize(self, loop.abandon_engine)
        self._finalizer.atexit = False  # at exit the loop closes what is left


def _settle(results: Sequence[Any], return_exceptions: bool) -> list[Any]:
    """Raise the first error; with `return_exceptions` only one that is not ours."""
    for one in results:
        allowed = return_exceptions and isinstance(one, MolmoEdgeError)
        if isinstance(one, BaseException) and not allowed:
            raise one
    return list(results)
