"""`EdgeVLM`: the one class users meet. It only joins the other rooms of the house."""

from __future__ import annotations

import asyncio
import itertools
import time
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, Unpack, overload

from molmo_edge.checkpoints import default_cache_dir, locate
from molmo_edge.devices.detect import DeviceInfo, detect
from molmo_edge.devices.profiles import load_profile, select_profile
from molmo_edge.engine.build import build, plan_build, quiet, require_vllm
from molmo_edge.engine.loop import EngineLoop, State, timed_out
from molmo_edge.engine.seam import Engine, Turn
from molmo_edge.engine.ticket import Ticket
from molmo_edge.errors import MolmoEdgeError, PromptError, QueueFull
from molmo_edge.families import Family, family_of
from molmo_edge.images import ImageLike, ImageLimits
from molmo_edge.molmo.layout import read_config
from molmo_edge.requests import (
    Asked,
    Options,
    Request,
    check_options,
    check_token_ids,
    single_turn,
    turns_of,
)
from molmo_edge.results import Result, Score
from molmo_edge.sampling import Sampling
from molmo_edge.settings import EdgeSettings, resolve
from molmo_edge.stream import Stream

__all__ = ["EdgeVLM", "Request"]

T = TypeVar("T")
# Threads that preprocess for asyncio callers; a burst of requests shares them.
_RENDER_THREADS = 4

# The prompts Molmo was trained with (PixMo-Cap), by length.
CAPTIONS: Mapping[str, str] = {
    "short": "Describe this image in one sentence.",
    "normal": "Describe this image.",
    "long": "Describe this image in detail.",
}


class EdgeVLM:
    """A vision-language model in this process.

    Safe to use from many threads and from asyncio at once: one engine thread serves them all.

    Args:
        model: checkpoint folder, hub name, or ``"stub"`` (the default: real architecture, made-up
            weights, no download).
        config: a TOML file of settings.
        profile: device profile by name; found out when not given.
        engine: builds another engine than vLLM's, such as `molmo_edge.engine.fake.FakeEngine`;
            called in the engine's thread. Model and device settings then mean nothing.
        engine_args: further arguments of `vllm.LLM`, as given.
        settings: any field of `EdgeSettings`. Arguments beat the environment (`MOLMO_EDGE_*`),
            which beats `.env`, which beats the config file, which beats the profile.

    Raises:
        ConfigError: a setting is unknown or wrong.
        ModelError: no such checkpoint, or a layout that is not supported.
        MissingDependencyError: no vLLM is installed.
        EngineStartError: vLLM could not be started; the cause is chained.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        config: str | Path | None = None,
        profile: str | None = None,
        precision: str | None = None,
        kv_cache_dtype: str | None = None,
        dtype: str | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_crops: int | None = None,
        load_format: str | None = None,
        seed: int | None = None,
        engine_args: Mapping[str, Any] | None = None,
        engine: Callable[[], Engine] | None = None,
        **settings: Any,
    ) -> None:
        self.device: DeviceInfo = detect()
        self._profile_env: Mapping[str, str] = {}
        resolved = resolve(
            {
                "model": None if model is None else str(model),
                "profile": profile,
                "precision": precision,
                "kv_cache_dtype": kv_cache_dtype,
                "dtype": dtype,
                "max_model_len": max_model_len,
                "max_num_seqs": max_num_seqs,
                "max_crops": max_crops,
                "load_format": load_format,
                "seed": seed,
                "engine_args": None if engine_args is None else dict(engine_args),
                **settings,
            },
            config=config,
            profile_settings=self._profile,
        )
        self.settings: EdgeSettings = resolved.settings
        self.family: Family | None = None
        self._limits = ImageLimits(self.settings.max_image_bytes, self.settings.max_image_pixels)
        self._factory = self._vllm_factory(resolved.profile_name) if engine is None else engine
        self._ids = itertools.count()
        self._pool = ThreadPoolExecutor(_RENDER_THREADS, thread_name_prefix="molmo-edge-render")
        self._loop = self._start()

    # Asking.

    def query(self, image: ImageLike | None, text: str, **options: Unpack[Options]) -> Result:
        """Answers one question about a picture, or about none.

        Args:
            image: bytes, path, PIL image, H×W×3 uint8 RGB array, or None.
            text: the question.
            options: see `Options`.

        Raises:
            InputError: refused before it reached the engine; the next call works.
            RequestTimeout: `timeout` passed; its `.partial` holds the text so far.
            QueueFull, EngineDeadError, EngineClosedError, EngineForkedError.
        """
        return self.stream(image, text, **options).result()

    def stream(self, image: ImageLike | None, text: str, **options: Unpack[Options]) -> Stream:
        """Like `query`, but returns at once with the answer's text as it comes."""
        return self._open(lambda: single_turn(image, text, self._limits), options)

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Unpack[Options]) -> Result:
        """Answers the last message of a conversation; its picture belongs to the first.

        Messages are ``{"role": "user", "content": …}``, content being a text or a list of
        ``{"type": "text", "text": …}`` and ``{"type": "image", "image": …}``.
        """
        return self._open(lambda: turns_of(messages, self._limits), options).result()

    def caption(
        self,
        image: ImageLike,
        length: Literal["short", "normal", "long"] = "normal",
        **options: Unpack[Options],
    ) -> Result:
        """Describes a picture."""
        if length not in CAPTIONS:
            raise ValueError(f"length must be one of {', '.join(CAPTIONS)}.")
        return self.query(image, CAPTIONS[length], **options)

    def score(
        self,
        image: ImageLike | None,
        text: str,
        answer: Sequence[int],
        *,
        candidates: Sequence[Sequence[int]] | None = None,
        max_crops: int | None = None,
    ) -> Score:
        """Teacher-forced log-probabilities of an answer's tokens; what drift is measured with.

        Each token is one request behind the tokens before it, so that the KV cache is read as in
        decoding; with `enable_prefix_caching` all but the first cost one token.

        Args:
            answer: token ids, as in `Result.token_ids`; at least one.
            candidates: for each token of the answer, further token ids to score in its place.

        Raises:
            PromptError: the answer is empty or not token ids, or candidates do not match it.
        """
        ids = check_token_ids(answer)
        others = [[] for _ in ids] if candidates is None else [list(c) for c in candidates]
        if len(others) != len(ids):
            raise PromptError("Give candidates for each token of the answer, or none at all.")
        turns = single_turn(image, text, self._limits)

        def ask(i: int) -> Stream:
            wanted = tuple(dict.fromkeys([ids[i], *others[i]]))
            asked = Asked(Sampling(max_tokens=1, logprob_token_ids=wanted), max_crops, None)
            return self._submit(lambda: turns, asked, answer=ids[:i], wait=True)

        first = ask(0)
        entries = [_only(first.result())]
        # Behind the first, whose prefix the others share.
        later = [ask(i) for i in range(1, len(ids))]
        entries += [_only(stream.result()) for stream in later]
        return Score(
            token_ids=tuple(ids),
            logprobs=tuple(entry[token] for token, entry in zip(ids, entries, strict=True)),
            candidates=tuple(
                {token: entry[token] for token in wanted}
                for wanted, entry in zip(others, entries, strict=True)
            ),
            prompt_token_ids=first.prompt_token_ids or (),
        )

    @overload
    def batch(
        self,
        requests: Iterable[Request],
        *,
        return_exceptions: Literal[False] = False,
        progress: bool = False,
    ) -> list[Result]: ...

    @overload
    def batch(
        self,
        requests: Iterable[Request],
        *,
        return_exceptions: Literal[True],
        progress: bool = False,
    ) -> list[Result | MolmoEdgeError]: ...

    def batch(
        self,
        requests: Iterable[Request],
        *,
        return_exceptions: bool = False,
        progress: bool = False,
    ) -> list[Result] | list[Result | MolmoEdgeError]:
        """Answers many requests by continuous batching; results in order.

        A request that fails is its own failure: the others finish. Then the first error is raised,
        or with `return_exceptions` errors stand in the list.
        """
        streams: list[Stream | MolmoEdgeError] = []
        results: list[Result | MolmoEdgeError] = []
        try:
            for request in requests:
                streams.append(_caught(lambda r=request: self._open_request(r)))  # type: ignore[misc]
            for one in _tracked(streams, progress):
                results.append(_caught(one.result) if isinstance(one, Stream) else one)
        finally:
            for one in streams:
                if isinstance(one, Stream):
                    one.cancel()
        return _sorted_out(results, return_exceptions)

    # Asking, for asyncio.

    async def aquery(
        self, image: ImageLike | None, text: str, **options: Unpack[Options]
    ) -> Result:
        """`query` for asyncio; cancelling the task frees the sequence."""
        stream = await self._aopen(lambda: self.stream(image, text, **options))
        return await stream.aresult()

    def astream(self, image: ImageLike | None, text: str, **options: Unpack[Options]) -> AStream:
        """`stream` for asyncio: ``async for`` over it, or ``await`` it for the `Stream`."""
        return AStream(self._aopen, lambda: self.stream(image, text, **options))

    async def abatch(
        self, requests: Iterable[Request], *, return_exceptions: bool = False
    ) -> list[Result] | list[Result | MolmoEdgeError]:
        """`batch` for asyncio."""

        async def one(request: Request) -> Result | MolmoEdgeError:
            try:
                stream = await self._aopen(lambda: self._open_request(request))
                return await stream.aresult()
            except MolmoEdgeError as exc:
                return exc

        return _sorted_out(
            list(await asyncio.gather(*map(one, requests))), return_exceptions
        )

    # The engine.

    @property
    def state(self) -> State:
        """Where the engine stands: new, starting, ready, stalled, closing, closed or dead."""
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
    def startup(self) -> Mapping[str, float]:
        """Seconds of each part of the start."""
        return self._loop.engine.info.startup_s

    def supports(self, verb: str) -> bool:
        """Whether the model can do it: query, chat, caption, point, count."""
        return self.family is None or verb in self.family.verbs

    def reset_caches(self) -> None:
        """Empties prefix, picture and encoder caches, between steps."""
        self.in_engine_thread(lambda engine: engine.reset_caches())

    def in_engine_thread(self, function: Callable[[Any], T]) -> T:
        """Runs `function(engine)` between steps in the thread that owns the engine.

        For what this class does not offer: with vLLM, ``engine.llm`` is the `vllm.LLM`.
        """
        return self._loop.call(function)

    def restart(self) -> None:
        """Frees the engine, dead or alive, and builds a new one with the same settings."""
        self._loop.close()
        self._loop = self._start()

    def close(self, timeout: float | None = None, *, drain: bool = False) -> bool:
        """Ends the engine and gives its memory back; from any thread, any number of times.

        Args:
            timeout: most seconds to wait; None for as long as it takes.
            drain: let requests in flight finish; otherwise they end with EngineClosedError.

        Returns:
            Whether the engine is gone. With False it goes as soon as its current step ends.
        """
        gone = self._loop.close(timeout, drain=drain)
        self._pool.shutdown(wait=gone and timeout is None, cancel_futures=True)
        return gone

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _profile(self, asked: str) -> tuple[str, dict[str, Any]]:
        profile = select_profile(self.device)[0] if asked == "auto" else load_profile(asked)
        self._profile_env = profile.env
        return profile.name, profile.as_settings()

    def _vllm_factory(self, profile_name: str | None) -> Callable[[], Engine]:
        require_vllm()
        quiet()
        settings = self.settings
        folder = locate(settings.model, settings.cache_dir or default_cache_dir())
        config = read_config(folder)
        self.family = family_of(config)
        self.family.check(config, folder, settings.load_format)
        plan = plan_build(
            settings, self.device, self.family, folder, config, (profile_name, self._profile_env)
        )
        return lambda: build(plan)

    def _start(self) -> EngineLoop:
        loop = EngineLoop(
            self._factory, max_queue=self.settings.max_queue, stall_s=self.settings.stall_s
        )
        try:
            loop.start()
        except BaseException:
            loop.close(timeout=0)
            raise
        weakref.finalize(self, loop.abandon_engine).atexit = False
        return loop

    def _open_request(self, request: Request) -> Stream:
        return self._open(
            lambda: single_turn(request.image, request.text, self._limits),
            request.options(),
            wait=True,
        )

    def _open(
        self, turns: Callable[[], list[Turn]], options: Options, *, wait: bool = False
    ) -> Stream:
        return self._submit(turns, check_options(options, self.settings.max_crops), wait=wait)

    def _submit(
        self,
        turns: Callable[[], list[Turn]],
        asked: Asked,
        *,
        answer: Sequence[int] = (),
        wait: bool = False,
    ) -> Stream:
        """The way of every request: render in this thread, then hand over to the engine's."""
        started = time.monotonic()
        deadline = None if asked.timeout is None else started + asked.timeout
        loop = self._loop
        engine = loop.engine
        rendered = engine.render(turns(), {"max_crops": asked.max_crops, "answer": answer})
        ticket = Ticket(
            f"request-{next(self._ids)}",
            rendered,
            asked.sampling,
            started=started,
            preprocess_s=time.monotonic() - started,
            deadline=deadline,
            environment=engine.info.environment,
        )
        try:
            # Without a deadline a full queue is an error at once, except for our own batches.
            left = None if wait else 0.0
            if deadline is not None:
                left = max(0.0, deadline - time.monotonic())
            loop.submit(ticket, wait_s=left)
        except QueueFull:
            if deadline is not None:
                raise timed_out() from None
            raise
        return Stream(loop, ticket)

    async def _aopen(self, open_stream: Callable[[], Stream]) -> Stream:
        """Renders and submits off the event loop; a cancelled task leaves no request behind."""
        future = self._pool.submit(open_stream)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.add_done_callback(_cancel_opened)
            raise


class AStream:
    """What `EdgeVLM.astream` returns: await it for the `Stream`, or iterate over its deltas."""

    def __init__(
        self,
        aopen: Callable[[Callable[[], Stream]], Any],
        open_stream: Callable[[], Stream],
    ) -> None:
        self._aopen = aopen
        self._open_stream = open_stream

    def __await__(self) -> Generator[Any, None, Stream]:
        return self._aopen(self._open_stream).__await__()  # type: ignore[no-any-return]

    async def __aiter__(self) -> AsyncIterator[str]:
        async with await self as stream:
            async for delta in stream:
                yield delta


def _only(result: Result) -> Mapping[int, float]:
    assert result.top_logprobs is not None
    return result.top_logprobs[0]


def _cancel_opened(future: Any) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().cancel()


def _caught(function: Callable[[], T]) -> T | MolmoEdgeError:
    try:
        return function()
    except MolmoEdgeError as exc:
        return exc


def _tracked(items: Sequence[T], progress: bool) -> Iterable[T]:
    if not progress:
        return items
    from rich.progress import track

    return track(items, description="Answering")


def _sorted_out(
    results: list[Result | MolmoEdgeError], return_exceptions: bool
) -> list[Result] | list[Result | MolmoEdgeError]:
    if return_exceptions:
        return results
    answers: list[Result] = []
    for one in results:
        if isinstance(one, MolmoEdgeError):
            raise one
        answers.append(one)
    return answers
