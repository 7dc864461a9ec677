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
    AsyncIterable,
    Callable,
    Generator,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, Literal, Self, TypeAlias, TypeVar, Unpack, cast, overload

from molmo_edge.checkpoint_files import read_config
from molmo_edge.devices.detect import DeviceInfo
from molmo_edge.devices.plan import Plan, plan
from molmo_edge.devices.shapes import ModelShape
from molmo_edge.engine.build import build, quiet, set_environment
from molmo_edge.engine.loop import EngineLoop, State
from molmo_edge.engine.pending import PendingRequest, timed_out
from molmo_edge.engine.vllm_args import (
    cache_root,
    engine_device,
    engine_environment,
    plan_build,
    planning_settings,
    require_vllm,
    resolve_for,
)
from molmo_edge.engine.vllm_errors import mapped
from molmo_edge.errors import (
    ConfigError,
    EngineClosedError,
    EngineError,
    ImageError,
    MolmoEdgeError,
    PromptError,
)
from molmo_edge.images import ImageLike, ImageLimits
from molmo_edge.interface import PROMPTS, Engine, ModelFamily, Rendered, Turn
from molmo_edge.models.hub import locate
from molmo_edge.models.registry import family_of
from molmo_edge.points import CountResult, PointResult, TrackResult
from molmo_edge.requests import (
    CAPTION_PROMPTS,
    MAX_CHOICE_TOKENS,
    MEDIA_IN_MESSAGES,
    CheckedOptions,
    ChoiceOptions,
    Images,
    Length,
    Options,
    Request,
    VideoOptions,
    check_choices,
    check_length,
    check_options,
    check_token_ids,
    check_turns,
    listed,
    numbered,
    read_labels,
    read_turns,
    token_tree,
)
from molmo_edge.results import Choice, Result, Score
from molmo_edge.settings import EdgeSettings, Resolved, plain
from molmo_edge.stream import AStream, Stream, wait_any
from molmo_edge.video import Clip, VideoLike, VideoLimits, load_video
from molmo_edge.warmup import WarmupReport, warm
from molmo_edge.watch import Camera, Seen, Source, arun, run

A = TypeVar("A")
T = TypeVar("T")
Labels: TypeAlias = list[str] | tuple[str, ...]
# Beginning of an answer → token → its log-probability after it.
Scores: TypeAlias = Mapping[tuple[int, ...], Mapping[int, float]]


class WatchOptions(Options, total=False):
    """Options of `EdgeVLM.watch`, beside those of each request.

    Attributes:
        point, count: a label in place of the question; `Seen.points` and `Seen.count` have the
            answer, and `Seen.draw` shows it.
        drop: ``"oldest"``, the default: a frame that arrives while another is answered replaces
            the one that waits; ``"none"``: the source is read only as fast as frames are answered.
        max_fps: maximum number of frames per second, in questions and in a window.
        frame_timeout: seconds without a new frame after which the source has stalled, 10 by
            default; None waits forever.
        on_stall: ``"raise"`` CameraError, the default, or ``"reconnect"``: open the source again,
            with growing pauses, until it delivers.
        window: ask about a video instead: the newest frame and up to ``window - 1`` before it,
            answered or not, at their capture times. At least 2; for what happens rather than
            what is there. Models learned from 2 frames per second: ``max_fps=2``.

    A frame that misses its `timeout` is yielded with `error`.
    """

    point: str | None
    count: str | None
    drop: Literal["oldest", "none"]
    max_fps: float | None
    frame_timeout: float | None
    on_stall: Literal["raise", "reconnect"]
    window: int | None


class EdgeVLM:
    """A vision-language model in this process.

    Safe to use from many threads and from asyncio at once: one engine thread serves them all.

    Args:
        model: checkpoint directory, hub name, or a built-in one: ``"demo"``, the default, is a
            small Molmo 2 that knows drawn shapes; ``"stub"`` and ``"stub-2"`` have Molmo 1's and
            Molmo 2's vision tower and random weights.
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
        resolved, self._profile = resolve_for(
            self.device,
            {
                "model": None if model is None else str(model),
                "engine": None if callable(engine) else engine,
                **settings,
            },
            config,
        )
        self.settings: EdgeSettings = resolved.settings
        self._planning = planning_settings(resolved)
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
            max_image_bytes=self.settings.max_image_bytes,
        )
        self._factory: Callable[[Callable[[], bool]], Engine] = (
            (lambda _: engine()) if callable(engine) else self._vllm_factory(resolved, began)
        )
        self._ids = itertools.count()
        self._closed = False
        self._restarting = threading.Lock()
        self._finalizer: weakref.finalize[..., EdgeVLM] | None = None
        self._start()

    # Questions.

    def query(self, image: Images | None, text: str, **options: Unpack[VideoOptions]) -> Result:
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
        return self._answer(Request(image, text, **options))

    def stream(self, image: Images | None, text: str, **options: Unpack[VideoOptions]) -> Stream:
        """Like `query`, but return at once with the answer's text as it is generated."""
        return self._open(Request(image, text, **options)).stream

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Unpack[Options]) -> Result:
        """Answer the last message of a conversation.

        Messages are ``{"role": "user", "content": …}``, content being a string or a list of
        ``{"type": "text", "text": …}``, ``{"type": "image", "image": …}`` and
        ``{"type": "video", "video": …}``: images in any of the user's messages, or one video.
        Molmo 1 takes one image, in the first message. Raises as `query`.
        """
        return self._answer(Request.chat(messages, **options))

    def chat_stream(
        self, messages: Sequence[Mapping[str, Any]], **options: Unpack[Options]
    ) -> Stream:
        """Like `chat`, but return at once with the answer's text as it is generated."""
        return self._open(Request.chat(messages, **options)).stream

    @overload
    def batch(self, requests: Iterable[Request[A]]) -> list[A]: ...

    @overload
    def batch(
        self, requests: Iterable[Request[A]], *, return_exceptions: bool
    ) -> list[A | MolmoEdgeError]: ...

    def batch(
        self, requests: Iterable[Request[A]], *, return_exceptions: bool = False
    ) -> list[A] | list[A | MolmoEdgeError]:
        """Answer many requests of any kind by continuous batching; answers in order.

        A request that fails is its own failure: the others finish. Then the first error is raised,
        or with `return_exceptions` errors stand in the list.
        """
        return _settle(dict(self.iter_batch(requests)), return_exceptions)

    def iter_batch(
        self, requests: Iterable[Request[A]]
    ) -> Generator[tuple[int, A | MolmoEdgeError], None, None]:
        """`batch` that yields (index, answer or error) as answers finish.

        Requests are taken from the iterable as the engine has room for them, in this thread: while
        the iterable blocks, no answer is yielded. Leaving the loop early cancels what is in flight.
        """
        waiting, most = numbered(requests), 2 * self.settings.max_num_seqs
        opened: dict[int, _Opened[A]] = {}
        try:
            while True:
                if len(opened) < most and (item := next(waiting, None)) is not None:
                    try:
                        opened[item[0]] = self._open(item[1], wait=True)
                    except MolmoEdgeError as exc:
                        yield item[0], exc
                elif opened:
                    wait_any([one.stream for one in opened.values()])
                else:
                    return
                for index in [i for i, one in opened.items() if one.stream.done]:
                    try:
                        answer: A | MolmoEdgeError = opened.pop(index).answer()
                    except MolmoEdgeError as exc:
                        answer = exc
                    yield index, answer
        finally:
            for one in opened.values():
                one.stream.cancel()

    def choose(
        self,
        image: Images | None,
        text: str | Sequence[Mapping[str, Any]],
        choices: Sequence[str],
        **options: Unpack[ChoiceOptions],
    ) -> Choice:
        """Choose the most likely of several answers, and say how likely each is.

        A choice is as probable as all of its tokens are, one after the other. First tokens are
        scored by the prefill of the prompt, which the others share: one step for each beginning
        that choices have, `max_num_seqs` at a time. Requests about the same image share what whole
        blocks of the KV cache hold of it (16 tokens on GPUs, 128 on CPUs).

        Args:
            text: the question, or a conversation as `chat` takes it; then no image and no video.
            choices: 2 to 100 answers as the model would write them, "Yes" rather than "yes": with
                `Choice.outside` near 1 it would have written none of them. One that begins
                another, as "red" does "red cup", is at least as probable.
            options: see `ChoiceOptions`.

        Raises:
            PromptError: a choice is empty or equal to another one, or has control characters or
                special tokens; or together they have over 1,000 tokens.
            SamplingError: another option, such as temperature.
            As `query`.
        """
        return self._answer(Request.choose(image, text, choices, **options))

    def check(self, request: Request[Any]) -> None:
        """Prepare a request and ask nothing. Raises as `query` does before the engine has it."""
        self._prepare(self._loop, request, self._check(request))

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

        Each token is one request that follows the tokens before it and shares the prefill of the
        first, so that the KV cache is read as in decoding.

        Args:
            text: the question, or a conversation as `chat` takes it; then no image and no video.
            answer: token ids, as in `Result.token_ids`; at least one.
            candidates: for each token of the answer, further token ids to score in its place.

        Raises:
            PromptError: the answer is empty, too long or not token ids, or candidates do not
                match it.
            As `query`; the first failure ends all.
        """
        ids = check_token_ids(answer)
        given = [[] for _ in ids] if candidates is None else listed(candidates)
        others = [check_token_ids(one) for one in given] if isinstance(given, Sequence) else []
        if not ids or len(others) != len(ids):
            raise PromptError(
                "Give at least one token to score, and candidates for each token or none at all."
            )
        if not isinstance(text, str) and (image is not None or video is not None):
            raise PromptError(MEDIA_IN_MESSAGES)
        asked = (
            Request(image, text, video=video, max_tokens=1)
            if isinstance(text, str)
            else Request.chat(text, max_tokens=1)
        )
        options, loop = self._check(asked), self._loop
        options = options.model_copy(update={"reuse_prefix": True})
        rendered = self._render(loop, self._read(asked), options)
        tree = {tuple(ids[:i]): [token, *others[i]] for i, token in enumerate(ids)}

        def read(scores: Scores, results: Sequence[Result]) -> Score:
            entries = list(scores.values())
            return Score(
                token_ids=tuple(ids),
                logprobs=tuple(entry[token] for token, entry in zip(ids, entries, strict=True)),
                candidates=tuple(
                    {token: entry[token] for token in scored}
                    for scored, entry in zip(others, entries, strict=True)
                ),
                prompt_token_ids=tuple(rendered.token_ids or ()),
                # The most likely token is scored too.
                greedy_token_ids=tuple(max(entry, key=entry.__getitem__) for entry in entries),
            )

        (first, *rest), scored = self._scoring(loop, rendered, options, tree, read)
        return _Opened(loop, self._submit(loop, first, wait=True), scored, rest).answer()

    # Questions, for asyncio.

    async def aquery(
        self, image: Images | None, text: str, **options: Unpack[VideoOptions]
    ) -> Result:
        """`query` for asyncio; cancelling the task frees the sequence."""
        return await self._aanswer(Request(image, text, **options))

    async def achoose(
        self,
        image: Images | None,
        text: str | Sequence[Mapping[str, Any]],
        choices: Sequence[str],
        **options: Unpack[ChoiceOptions],
    ) -> Choice:
        """`choose` for asyncio."""
        return await self._aanswer(Request.choose(image, text, choices, **options))

    def astream(self, image: Images | None, text: str, **options: Unpack[VideoOptions]) -> AStream:
        """`stream` for asyncio: ``async for`` over it, or ``await`` it for the `Stream`."""
        return self._astream(Request(image, text, **options))

    async def achat(
        self, messages: Sequence[Mapping[str, Any]], **options: Unpack[Options]
    ) -> Result:
        """`chat` for asyncio."""
        return await self._aanswer(Request.chat(messages, **options))

    def achat_stream(
        self, messages: Sequence[Mapping[str, Any]], **options: Unpack[Options]
    ) -> AStream:
        """`chat_stream` for asyncio; see `astream`."""
        return self._astream(Request.chat(messages, **options))

    @overload
    async def abatch(
        self, requests: Iterable[Request[A]] | AsyncIterable[Request[A]]
    ) -> list[A]: ...

    @overload
    async def abatch(
        self,
        requests: Iterable[Request[A]] | AsyncIterable[Request[A]],
        *,
        return_exceptions: bool,
    ) -> list[A | MolmoEdgeError]: ...

    async def abatch(
        self,
        requests: Iterable[Request[A]] | AsyncIterable[Request[A]],
        *,
        return_exceptions: bool = False,
    ) -> list[A] | list[A | MolmoEdgeError]:
        """`batch` for asyncio; one request at a time is prepared, all others are answered."""
        answers = {index: answer async for index, answer in self.aiter_batch(requests)}
        return _settle(answers, return_exceptions)

    async def aiter_batch(
        self, requests: Iterable[Request[A]] | AsyncIterable[Request[A]]
    ) -> AsyncGenerator[tuple[int, A | MolmoEdgeError], None]:
        """`iter_batch` for asyncio; to leave the loop early, use ``contextlib.aclosing``.

        Other threads advance an iterable that is not an async one, so it may block.
        """
        preparing = asyncio.Lock()
        tasks: set[asyncio.Task[tuple[int, A | MolmoEdgeError] | None]] = set()

        async def answer() -> tuple[int, A | MolmoEdgeError] | None:
            item = None
            try:
                async with preparing:
                    if (item := await anext(source, None)) is None:
                        return None
                    opened = await self._aopen(item[1], wait=True)
                return item[0], await opened.aanswer()
            except MolmoEdgeError as exc:
                if item is None:  # the iterable's own
                    raise
                return item[0], exc

        async with aclosing(_taken(requests)) as source:
            try:
                tasks = {
                    asyncio.create_task(answer()) for _ in range(2 * self.settings.max_num_seqs)
                }
                while tasks:
                    done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        if (one := task.result()) is not None:
                            tasks.add(asyncio.create_task(answer()))
                            yield one
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    # Tasks with Molmo's own prompts.

    def supports(self, verb: str) -> bool:
        """Whether the model can query, chat, choose, caption, point, count, track, images, video.

        ``"images"``: several in one request; ``"video"``: the argument of that name.
        """
        return self.family is None or verb in self.family.verbs

    def caption(
        self, image: ImageLike, length: Length = "normal", **options: Unpack[Options]
    ) -> Result:
        """Describe an image. Raises as `query`, and PromptError for another length."""
        return self._answer(Request.caption(image, length, **options))

    @overload
    def point(
        self, image: Images | None = None, label: str = "", **options: Unpack[VideoOptions]
    ) -> PointResult: ...

    @overload
    def point(
        self, image: Images | None = None, label: Labels = ..., **options: Unpack[VideoOptions]
    ) -> list[PointResult]: ...

    def point(
        self, image: Images | None = None, label: str | Labels = "", **options: Unpack[VideoOptions]
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
            As `query`; with several labels, after all of them have ended.
        """
        if isinstance(label, str):
            return self._answer(Request.point(image, label, **options))
        return self.batch(self._point_requests(image, label, options))

    def count(
        self, image: Images | None = None, label: str = "", **options: Unpack[VideoOptions]
    ) -> CountResult:
        """Count what a label names, by the answer's points where it has any.

        Over all images, or the whole video. Takes and raises what `point` does, for one label.
        """
        return self._answer(Request.count(image, label, **options))

    def track(self, video: VideoLike, label: str, **options: Unpack[Options]) -> TrackResult:
        """Follow what a label names through a video.

        Args:
            video: as in `query`; the model states positions at its sampled frames.
            label: as in `point`.
            options: see `Options`; `max_tokens` is 2048 unless given.

        Raises:
            As `point`.
        """
        return self._answer(Request.track(video, label, **options))

    async def acaption(
        self, image: ImageLike, length: Length = "normal", **options: Unpack[Options]
    ) -> Result:
        """`caption` for asyncio."""
        return await self._aanswer(Request.caption(image, length, **options))

    @overload
    async def apoint(
        self, image: Images | None = None, label: str = "", **options: Unpack[VideoOptions]
    ) -> PointResult: ...

    @overload
    async def apoint(
        self, image: Images | None = None, label: Labels = ..., **options: Unpack[VideoOptions]
    ) -> list[PointResult]: ...

    async def apoint(
        self, image: Images | None = None, label: str | Labels = "", **options: Unpack[VideoOptions]
    ) -> PointResult | list[PointResult]:
        """`point` for asyncio."""
        if isinstance(label, str):
            return await self._aanswer(Request.point(image, label, **options))
        with mapped("render"):  # there may be no thread left
            requests = await asyncio.to_thread(self._point_requests, image, label, options)
        return await self.abatch(requests)

    async def acount(
        self, image: Images | None = None, label: str = "", **options: Unpack[VideoOptions]
    ) -> CountResult:
        """`count` for asyncio."""
        return await self._aanswer(Request.count(image, label, **options))

    async def atrack(self, video: VideoLike, label: str, **options: Unpack[Options]) -> TrackResult:
        """`track` for asyncio."""
        return await self._aanswer(Request.track(video, label, **options))

    def watch(
        self, source: Source, question: str | None = None, **options: Unpack[WatchOptions]
    ) -> Generator[Seen, None, None]:
        """Ask the same question about a camera's newest frame, again and again.

        Args:
            source: see `molmo_edge.watch.Camera`.
            question: by default for a short caption.
            options: see `WatchOptions`.

        Returns:
            An iterator of `Seen`, ending where the source ends. Closing or dropping it closes the
            source and joins its thread.

        Raises:
            ConfigError: at once, for a wrong argument, or a window if the model has no video.
            CameraError, MissingDependencyError: while iterating.
            As `query`: at once about options, question and labels, while iterating about the rest.
        """
        camera, request = self._watching(source, question, dict(options))
        return run(camera, lambda frame: self._answer(request(frame)))

    def awatch(
        self, source: Source, question: str | None = None, **options: Unpack[WatchOptions]
    ) -> AsyncGenerator[Seen, None]:
        """`watch` for asyncio: ``async for`` over it; the event loop is never blocked.

        Leaving the loop early leaves the source open until the iterator is closed: use
        ``contextlib.aclosing`` where that matters.
        """
        camera, request = self._watching(source, question, dict(options))
        return arun(camera, lambda frame: self._aanswer(request(frame)))

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
        return plan(
            self.shape, self.device, profile=self._profile, settings=self._planning, **request
        )

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
        """Empty prefix, image and encoder caches, between steps. Raises EngineError."""
        try:
            self.in_engine_thread(lambda engine: engine.reset_caches())
        except MolmoEdgeError:
            raise
        except Exception as exc:
            raise EngineError(
                f"Emptying the caches failed: {type(exc).__name__}. The chained error says why."
            ) from exc

    def in_engine_thread(self, function: Callable[[Any], T]) -> T:
        """Run `function(engine)` between steps in the thread that owns the engine.

        For what this class does not offer: ``engine.llm`` is the `vllm.LLM`, or with
        ``engine="process"`` the `AsyncLLM`, whose coroutines ``engine.run`` awaits.

        Raises what the function raises, but EngineError for an exception class of vLLM's own.
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

        Raises ConfigError, and closes nothing, for a `timeout` that is no number of seconds.
        """
        timeout = plain(timeout)
        if timeout is not None and not (isinstance(timeout, int | float) and abs(timeout) < 1e9):
            raise ConfigError("close: timeout must be a number of seconds below 1e9, or None.")
        self._closed = True
        return self._loop.close(timeout, drain=drain)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if not self.close(timeout=0):
            await self._loop.async_gone()

    # A request's way.

    def _check(self, request: Request[Any]) -> CheckedOptions:
        """Check all but images and video, before any is loaded, and that the engine is ready."""
        self._loop.check()
        if not isinstance(request, Request):
            raise PromptError(
                f"An item of a batch must be a Request, not {type(request).__name__}."
            )
        if request.verb not in ("query", "chat"):
            self._require(request.verb)
        if request.verb == "choose":
            check_choices(request.choices)
            options = check_options(request.options, self._max_crops, ChoiceOptions)
            return options.model_copy(update={"max_tokens": 1, "reuse_prefix": True})
        request.prompt(PROMPTS)
        reuse = {"reuse_prefix": bool(self.environment.get("prefix_caching"))}
        return check_options(request.options, self._max_crops).model_copy(update=reuse)

    def _read(self, request: Request[Any]) -> list[Turn]:
        """Load images and video; the prompt of a task becomes the text."""
        turns = read_turns(request.messages, self._limits, self._load_clip)
        if request.verb == "caption" and len(turns[0].images) != 1:
            raise ImageError("A caption describes one image: give one, not none or several.")
        if request.verb in PROMPTS and not turns[0].images and turns[0].video is None:
            raise ImageError("There is nothing to look at: give an image, images or a video.")
        if request.verb not in ("query", "chat", "choose"):
            own = {} if self.family is None else self.family.prompts
            turns = [replace(turns[0], text=request.prompt({**PROMPTS, **own}))]
        return turns

    def _load_clip(self, video: VideoLike) -> Clip:
        self._require("video")
        return load_video(video, self._video_limits)

    def _point_requests(
        self, image: Images | None, labels: Labels, options: VideoOptions
    ) -> list[Request[PointResult]]:
        """A request for each label, about images and a video that are loaded once."""
        requests = [Request.point(image, one, **options) for one in read_labels(labels)]
        self._check(requests[0])
        [turn] = self._read(requests[0])
        for one in requests:
            one.messages = [turn]
        return requests

    def _answer(self, request: Request[A]) -> A:
        return self._open(request).answer()

    async def _aanswer(self, request: Request[A]) -> A:
        return await (await self._aopen(request)).aanswer()

    def _astream(self, request: Request[Any]) -> AStream:
        async def open_stream() -> Stream:
            return (await self._aopen(request)).stream

        return AStream(open_stream)

    def _open(self, request: Request[A], *, wait: bool = False) -> _Opened[A]:
        """Prepare a request in this thread and submit it; `wait` for room in a full queue."""
        checked, loop = self._check(request), self._loop
        (first, *rest), read = self._prepare(loop, request, checked)
        return _Opened(loop, self._submit(loop, first, wait=wait), read, rest)

    async def _aopen(self, request: Request[A], *, wait: bool = False) -> _Opened[A]:
        """`_open` for asyncio; the request is prepared in another thread."""
        checked, loop = self._check(request), self._loop
        try:
            async with asyncio.timeout(checked.timeout):
                with mapped("render"):  # there may be no thread left
                    (first, *rest), read = await asyncio.to_thread(
                        self._prepare, loop, request, checked
                    )
        except TimeoutError:
            raise timed_out() from None
        stream = Stream(loop, first)
        await loop.async_submit(first, wait=wait)
        return _Opened(loop, stream, read, rest)

    def _prepare(
        self, loop: EngineLoop, request: Request[A], options: CheckedOptions
    ) -> tuple[list[PendingRequest], Callable[..., A]]:
        """Return what to submit, the first alone and before the others, and what reads it."""
        turns = self._read(request)
        rendered = self._render(loop, turns, options)
        if request.verb != "choose":
            return [self._pending(loop, rendered, options)], request.reader(turns)
        with mapped("render"):
            answers = {
                choice: loop.engine.encode(text)
                for choice, text in check_choices(request.choices).items()
            }
        if not all(answers.values()) or len(set(map(tuple, answers.values()))) < len(answers):
            raise PromptError("A choice has no tokens, or the tokens of another one.")
        if (tokens := sum(map(len, answers.values()))) > MAX_CHOICE_TOKENS:
            raise PromptError(
                f"The choices have {tokens} tokens; give shorter ones, of at most "
                f"{MAX_CHOICE_TOKENS} together."
            )
        tree = token_tree(answers.values())
        choice = cast(Callable[..., A], partial(Choice.of, answers))
        return self._scoring(loop, rendered, options, tree, choice)

    def _scoring(
        self,
        loop: EngineLoop,
        rendered: Rendered,
        options: CheckedOptions,
        tree: Mapping[tuple[int, ...], Iterable[int]],
        read: Callable[[Scores, Sequence[Result]], A],
    ) -> tuple[list[PendingRequest], Callable[..., A]]:
        """Requests of one token that score what follows each beginning of an answer in `tree`.

        Also returns what reads their results: it calls `read` with the log-probabilities by
        beginning, and the results.
        """
        if rendered.prompt_tokens is not None:
            longest = rendered.prompt_tokens + max(map(len, tree))
            check_length(longest, loop.engine.info.max_model_len)
        requests = []
        for beginning, following in tree.items():
            scored = {"logprob_token_ids": tuple(dict.fromkeys(following))}
            one = options.model_copy(update=scored)
            requests.append(self._pending(loop, replace(rendered, answer=beginning), one))

        def read_scores(*results: Result) -> A:
            tops = [top for result in results for top in result.top_logprobs or ()]
            return read(dict(zip(tree, tops, strict=True)), results)

        return requests, read_scores

    def _submit(self, loop: EngineLoop, request: PendingRequest, *, wait: bool = False) -> Stream:
        # Before it is submitted, so that Ctrl-C in between leaves nothing in the engine.
        stream = Stream(loop, request)
        try:
            loop.submit(request, wait=wait)
        except BaseException:
            stream.cancel()
            raise
        return stream

    def _render(self, loop: EngineLoop, turns: Sequence[Turn], options: CheckedOptions) -> Rendered:
        engine = loop.engine
        with mapped("render"):
            if options.json_schema is not None:
                engine.check_schema(options.json_schema)
            return engine.render(
                turns, {"max_crops": options.max_crops, "reuse_prefix": options.reuse_prefix}
            )

    def _pending(
        self, loop: EngineLoop, rendered: Rendered, options: CheckedOptions
    ) -> PendingRequest:
        environment = loop.engine.info.environment
        return PendingRequest(f"request-{next(self._ids)}", rendered, options, environment)

    def _watching(
        self, source: Source, question: str | None, options: dict[str, Any]
    ) -> tuple[Camera, Callable[[Seen], Request[Any]]]:
        """Check the arguments of `watch`; return the camera, and what makes a frame's request."""
        own = ("drop", "max_fps", "frame_timeout", "on_stall", "window")
        given = {name: options.pop(name) for name in own if name in options}
        camera = Camera(source, **given)
        point, count = options.pop("point", None), options.pop("count", None)
        if sum(one is not None for one in (question, point, count)) > 1:
            raise ConfigError("Give only one of question, point and count.")
        make: Callable[..., Request[Any]] = Request
        text = CAPTION_PROMPTS["short"] if question is None else question
        if point is not None:
            make, text = Request.point, point
        elif count is not None:
            make, text = Request.count, count
        check_options(options, self._max_crops)  # names first: `Request` takes a video as well
        self._check(asked := make(None, text, **options))
        if asked.verb == "query":
            check_turns(self._read(asked))
        if (window := given.get("window")) is not None:
            self._require("video")
            if window > (limit := self._video_limits.max_frames):
                raise ConfigError(f"window must be at most {limit}, the engine's max_frames.")

        def request(frame: Seen) -> Request[Any]:
            image = frame.image if frame.video is None else None
            return make(image, text, video=frame.video, **options)

        return camera, request

    def _require(self, verb: str) -> None:
        if self.family is not None and verb not in self.family.verbs:
            raise ConfigError(
                f"This model's family, {self.family.name}, does not support {verb}; it supports "
                f"{', '.join(sorted(self.family.verbs))}. Use a Molmo 2 checkpoint."
            )

    # The engine's start.

    def _vllm_factory(
        self, resolved: Resolved, began: float
    ) -> Callable[[Callable[[], bool]], Engine]:
        require_vllm()
        quiet()
        settings = self.settings
        set_environment(engine_environment(settings, self.device))
        directory = locate(settings.model, cache_root(settings), settings.load_format)
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
        return lambda abandoned: build(build_plan, next(config_s, 0.0), abandoned)

    def _start(self) -> None:
        build_engine, settings = self._factory, self.settings

        def factory() -> Engine:
            return build_engine(lambda: loop.state is not State.STARTING)

        loop = self._loop = EngineLoop(
            factory, max_queue=settings.max_queue, stall_s=settings.stall_s
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


@dataclass(frozen=True)
class _Opened(Generic[A]):
    """A request in flight, those that share its prefill, and how their results become the answer.

    The others are submitted, all at once, when the first is done.
    """

    loop: EngineLoop
    stream: Stream
    read: Callable[..., A]
    rest: Sequence[PendingRequest]

    def answer(self) -> A:
        first = self.stream.result()
        with ExitStack() as stack:
            others = [stack.enter_context(Stream(self.loop, one)) for one in self.rest]
            for one in self.rest:
                self.loop.submit(one, wait=True)
            return self.read(first, *(one.result() for one in others))

    async def aanswer(self) -> A:
        first = await self.stream.aresult()
        with ExitStack() as stack:
            others = [stack.enter_context(Stream(self.loop, one)) for one in self.rest]
            for one in self.rest:
                await self.loop.async_submit(one, wait=True)
            return self.read(first, *[await one.aresult() for one in others])


async def _taken(
    requests: Iterable[Request[A]] | AsyncIterable[Request[A]],
) -> AsyncGenerator[tuple[int, Request[A]], None]:
    """Index and request of a batch. Raises as `numbered`."""
    if isinstance(requests, AsyncIterable):
        index = itertools.count()
        async for request in requests:
            yield next(index), request
        return
    waiting = numbered(requests)
    while (item := await asyncio.to_thread(next, waiting, None)) is not None:
        yield item


def _settle(answers: Mapping[int, Any], return_exceptions: bool) -> list[Any]:
    """The answers in order; the first error is raised unless errors may be returned."""
    ordered = [answers[index] for index in range(len(answers))]
    for index, one in enumerate(ordered):
        if isinstance(one, MolmoEdgeError) and not return_exceptions:
            one.args = (f"Request {index} of the batch: {one}",)
            raise one
    return ordered
