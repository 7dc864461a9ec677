"""Asking: the verbs that every model has, in their sync and asyncio forms.

How a request is opened is `opening`'s to know; nothing here knows of engines.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, Unpack, overload

from molmo_edge.errors import MolmoEdgeError, PromptError
from molmo_edge.images import ImageLike
from molmo_edge.opening import Opening
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
from molmo_edge.stream import AStream, Stream

T = TypeVar("T")


class Asking(Opening):
    """Query, chat, batch and score."""

    def query(self, image: ImageLike | None, text: str, **options: Unpack[Options]) -> Result:
        """Answers one question about a picture, or about none.

        Args:
            image: bytes, path, PIL image, H x W x 3 uint8 RGB array, or None.
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
        return self._open(lambda load: single_turn(image, text, load), options)

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Unpack[Options]) -> Result:
        """Answers the last message of a conversation; its picture belongs to the first.

        Messages are ``{"role": "user", "content": …}``, content being a text or a list of
        ``{"type": "text", "text": …}`` and ``{"type": "image", "image": …}``.
        """
        return self.chat_stream(messages, **options).result()

    def chat_stream(
        self, messages: Sequence[Mapping[str, Any]], **options: Unpack[Options]
    ) -> Stream:
        """Like `chat`, but returns at once with the answer's text as it comes."""
        return self._open(lambda load: turns_of(messages, load), options)

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
            SamplingError: `max_crops` is not from 1 to the engine's.
        """
        ids = check_token_ids(answer)
        others = [[] for _ in ids] if candidates is None else [list(c) for c in candidates]
        if len(others) != len(ids):
            raise PromptError("Give candidates for each token of the answer, or none at all.")
        crops = check_options({"max_crops": max_crops}, self.settings.max_crops).max_crops
        turns = single_turn(image, text, self._load)

        def ask(i: int) -> Stream:
            wanted = tuple(dict.fromkeys([ids[i], *others[i]]))
            asked = Asked(Sampling(max_tokens=1, logprob_token_ids=wanted), crops, None)
            return self._submit(lambda _: turns, asked, answer=ids[:i], wait=True)

        first = ask(0)
        results = [first.result()]
        # Behind the first, whose prefix the others share.
        later = [ask(i) for i in range(1, len(ids))]
        results += [stream.result() for stream in later]
        entries = [_only(result) for result in results]
        return Score(
            token_ids=tuple(ids),
            logprobs=tuple(entry[token] for token, entry in zip(ids, entries, strict=True)),
            candidates=tuple(
                {token: entry[token] for token in wanted}
                for wanted, entry in zip(others, entries, strict=True)
            ),
            prompt_token_ids=first.prompt_token_ids or (),
            # Each request generated one token greedily, and it is not counted among the answer's.
            greedy_token_ids=tuple(result.token_ids[0] for result in results),
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
        stream = await self._aopen(lambda load: single_turn(image, text, load), options)
        return await stream.aresult()

    def astream(self, image: ImageLike | None, text: str, **options: Unpack[Options]) -> AStream:
        """`stream` for asyncio: ``async for`` over it, or ``await`` it for the `Stream`."""
        return AStream(lambda: self._aopen(lambda load: single_turn(image, text, load), options))

    async def abatch(
        self, requests: Iterable[Request], *, return_exceptions: bool = False
    ) -> list[Result] | list[Result | MolmoEdgeError]:
        """`batch` for asyncio; one request at a time is prepared, all others are answered."""
        streams: list[Stream | MolmoEdgeError] = []
        results: list[Result | MolmoEdgeError] = []
        try:
            for request in requests:
                turns = functools.partial(single_turn, request.image, request.text)
                opening = self._aopen(turns, request.options(), wait=True)
                streams.append(await _acaught(opening))
            for one in streams:
                results.append(await _acaught(one.aresult()) if isinstance(one, Stream) else one)
        finally:
            for one in streams:
                if isinstance(one, Stream):
                    one.cancel()
        return _sorted_out(results, return_exceptions)

    def _open_request(self, request: Request) -> Stream:
        return self._open(
            lambda load: single_turn(request.image, request.text, load),
            request.options(),
            wait=True,
        )


def _only(result: Result) -> Mapping[int, float]:
    assert result.top_logprobs is not None
    return result.top_logprobs[0]


def _caught(function: Callable[[], T]) -> T | MolmoEdgeError:
    try:
        return function()
    except MolmoEdgeError as exc:
        return exc


async def _acaught(awaited: Awaitable[T]) -> T | MolmoEdgeError:
    try:
        return await awaited
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
