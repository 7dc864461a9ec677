"""OpenAI's chat completions in process: code that was written for a server, without one.

Extra ``openai``. The types of answers and errors are those of the ``openai`` package.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, Self

import httpx
import openai
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from molmo_edge.errors import (
    EngineError,
    GenerationError,
    MolmoEdgeError,
    PromptError,
    QueueFull,
    RequestTimeout,
)
from molmo_edge.stream import Stream
from molmo_edge.vlm import EdgeVLM

# Arguments of `create` that change no answer here.
_IGNORED = frozenset(
    {"model", "user", "metadata", "store", "service_tier", "extra_headers", "extra_query",
     "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
)  # fmt: skip
# Arguments that an `EdgeVLM` has too, by its names.
_OPTIONS = {
    "max_tokens": "max_tokens", "max_completion_tokens": "max_tokens", "temperature": "temperature",
    "top_p": "top_p", "seed": "seed", "stop": "stop", "timeout": "timeout",
}  # fmt: skip
_REQUEST = httpx.Request("POST", "http://molmo-edge.invalid/v1/chat/completions")


class Client:
    """``client.chat.completions.create(…)`` of ``openai.OpenAI``, answered by an `EdgeVLM`.

    Messages are as `EdgeVLM.chat` takes them, with images as base64 ``data:`` URLs; no URL is ever
    fetched. ``model`` is ignored. Unlike a server's, answers are greedy unless ``temperature`` is
    given.

    Args:
        vlm: stays open.
    """

    def __init__(self, vlm: EdgeVLM) -> None:
        self.chat = _Chat(Completions(vlm))


class AsyncClient:
    """`Client` for asyncio, as ``openai.AsyncOpenAI``."""

    def __init__(self, vlm: EdgeVLM) -> None:
        self.chat = _Chat(AsyncCompletions(vlm))


class _Chat:
    def __init__(self, completions: Any) -> None:
        self.completions = completions


class Completions:
    """What `Client.chat.completions` is."""

    def __init__(self, vlm: EdgeVLM) -> None:
        self._vlm = vlm
        self._ids = itertools.count(1)

    def create(self, **arguments: Any) -> Any:
        """Answer the last message: a ``ChatCompletion``, or with ``stream`` an iterator of chunks.

        Takes ``messages``, ``max_tokens``, ``max_completion_tokens``, ``temperature``, ``top_p``,
        ``seed``, ``stop``, ``timeout``, ``response_format``, ``stream`` and ``stream_options``.

        Raises:
            openai.BadRequestError: anything that this model, or molmo_edge, does not do.
            openai.RateLimitError: the queue is full.
            openai.APITimeoutError: ``timeout`` passed.
            openai.InternalServerError: the engine has died, or the model computed NaN.
        """
        try:
            asked = _Asked(arguments, self._vlm, next(self._ids))
            stream = self._vlm.chat_stream(asked.messages, **asked.options)
            return _Chunks(asked, stream) if asked.stream else asked.completion(stream)
        except MolmoEdgeError as exc:
            raise _translated(exc) from exc


class AsyncCompletions(Completions):
    """What `AsyncClient.chat.completions` is."""

    async def create(self, **arguments: Any) -> Any:
        """`Completions.create`; with ``stream`` an async iterator."""
        try:
            asked = _Asked(arguments, self._vlm, next(self._ids))
            stream = await self._vlm.achat_stream(asked.messages, **asked.options)
            if asked.stream:
                return _AsyncChunks(asked, stream)
            await _ended(stream)
            return asked.completion(stream)
        except MolmoEdgeError as exc:
            raise _translated(exc) from exc


async def _ended(stream: Stream) -> None:
    """Wait for the end, which `_Asked.completion` then reads."""
    try:
        await stream.aresult()
    except GenerationError:
        return


class _Asked:
    """The checked arguments of one `create`, and what its answers have in common."""

    def __init__(self, arguments: Mapping[str, Any], vlm: EdgeVLM, number: int) -> None:
        unset = (openai.NotGiven, openai.Omit)
        given = {k: v for k, v in arguments.items() if v is not None and not isinstance(v, unset)}
        self.messages = [_message(one) for one in given.pop("messages", ())]
        self.stream = bool(given.pop("stream", False))
        self.with_usage = bool(given.pop("stream_options", {}).get("include_usage"))
        self.options: dict[str, Any] = {
            _OPTIONS[name]: given.pop(name) for name in list(given) if name in _OPTIONS
        }
        if (schema := _schema(given.pop("response_format", {"type": "text"}))) is not None:
            self.options["json_schema"] = schema
        refused = [
            name
            for name, one in given.items()
            if name not in _IGNORED and one and (name, one) != ("n", 1)
        ]
        if refused:
            raise PromptError(f"molmo_edge has no {', '.join(refused)}; leave it out.")
        self._common = {
            "id": f"chatcmpl-{number}",
            "created": int(time.time()),
            "model": str(vlm.environment.get("model")),
        }

    def completion(self, stream: Stream) -> ChatCompletion:
        text, reason, usage = self._end(stream)
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "finish_reason": reason, "message": message}
        return ChatCompletion.model_validate(
            {**self._common, "object": "chat.completion", "choices": [choice], "usage": usage}
        )

    def first(self) -> ChatCompletionChunk:
        return self._chunk({"role": "assistant", "content": ""})

    def text(self, text: str) -> ChatCompletionChunk:
        return self._chunk({"content": text})

    def last(self, stream: Stream) -> list[ChatCompletionChunk]:
        _, reason, usage = self._end(stream)
        chunks = [self._chunk({}, reason)]
        if self.with_usage:
            chunks.append(self._validated([], usage))
        return chunks

    def _chunk(self, delta: Mapping[str, Any], reason: str | None = None) -> ChatCompletionChunk:
        return self._validated([{"index": 0, "delta": delta, "finish_reason": reason}], None)

    def _validated(self, choices: list[Any], usage: Any) -> ChatCompletionChunk:
        kind = "chat.completion.chunk"
        return ChatCompletionChunk.model_validate(
            {**self._common, "object": kind, "choices": choices, "usage": usage}
        )

    def _end(self, stream: Stream) -> tuple[str, str, dict[str, int] | None]:
        """Text, finish reason and usage; of JSON that was cut off, what a server returns."""
        try:
            result = stream.result()
        except GenerationError as exc:
            if "json_schema" not in self.options:
                raise
            return exc.partial, "length", None
        prompt, answer = result.metrics.prompt_tokens or 0, result.metrics.output_tokens
        usage = {"prompt_tokens": prompt, "completion_tokens": answer}
        return result.text, result.finish_reason, {**usage, "total_tokens": prompt + answer}


def _message(given: Any) -> Any:
    """A message as a mapping of role and content; answers of `create` are messages, too."""
    if hasattr(given, "model_dump"):
        given = given.model_dump()
    if not isinstance(given, Mapping):
        return given  # which `EdgeVLM.chat` refuses
    return {name: one for name, one in given.items() if one is not None}


def _schema(response_format: Any) -> Any:
    """The JSON Schema that a ``response_format`` asks for, None for text."""
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind == "json_schema" and isinstance(response_format.get("json_schema"), Mapping):
        return response_format["json_schema"].get("schema", {})
    raise PromptError("response_format is of type text, json_object or json_schema.")


class _Chunks:
    """What ``create(stream=True)`` returns: an iterator that is a context, as ``openai.Stream``."""

    def __init__(self, asked: _Asked, stream: Stream) -> None:
        self._asked, self._stream = asked, stream
        self._iterator = self._run()

    def _run(self) -> Iterator[ChatCompletionChunk]:
        try:
            yield self._asked.first()
            for text in self._stream:
                yield self._asked.text(text)
            yield from self._asked.last(self._stream)
        except MolmoEdgeError as exc:
            raise _translated(exc) from exc

    def __iter__(self) -> Iterator[ChatCompletionChunk]:
        return self._iterator

    def __next__(self) -> ChatCompletionChunk:
        return next(self._iterator)

    def close(self) -> None:
        """Stop generating."""
        self._stream.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _AsyncChunks:
    """`_Chunks` for asyncio, as ``openai.AsyncStream``."""

    def __init__(self, asked: _Asked, stream: Stream) -> None:
        self._asked, self._stream = asked, stream
        self._iterator = self._run()

    async def _run(self) -> AsyncIterator[ChatCompletionChunk]:
        try:
            yield self._asked.first()
            async for text in self._stream:
                yield self._asked.text(text)
            await _ended(self._stream)
            for chunk in self._asked.last(self._stream):
                yield chunk
        except MolmoEdgeError as exc:
            raise _translated(exc) from exc

    def __aiter__(self) -> AsyncIterator[ChatCompletionChunk]:
        return self._iterator

    async def __anext__(self) -> ChatCompletionChunk:
        return await anext(self._iterator)

    async def close(self) -> None:
        """Stop generating."""
        self._stream.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _translated(error: MolmoEdgeError) -> openai.APIError:
    """The error of the ``openai`` package that a server's answer would be."""
    if isinstance(error, RequestTimeout):
        return openai.APITimeoutError(_REQUEST)
    kind, status = openai.BadRequestError, 400
    if isinstance(error, QueueFull):
        kind, status = openai.RateLimitError, 429
    elif isinstance(error, EngineError | GenerationError):
        kind, status = openai.InternalServerError, 500
    body = {"message": str(error), "type": type(error).__name__, "param": None, "code": None}
    return kind(str(error), response=httpx.Response(status, request=_REQUEST), body=body)
