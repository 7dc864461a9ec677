"""OpenAI's own clients, answered in process: code that was written for a server, without one.

Extra ``openai``. Only the transport below the clients is ours: it answers ``/chat/completions``
and ``/models``.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import suppress
from typing import Any

import httpx
import openai

from molmo_edge.errors import (
    EngineError,
    GenerationError,
    MolmoEdgeError,
    PromptError,
    QueueFull,
    RequestTimeout,
)
from molmo_edge.requests import Options
from molmo_edge.stream import Stream
from molmo_edge.vlm import EdgeVLM

# Fields of a request that change no answer here.
_IGNORED = frozenset(
    {"model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
     "parallel_tool_calls"}
)  # fmt: skip
# Values of others that change none either.
_NEUTRAL: Mapping[str, Any] = {
    "n": 1, "logprobs": False, "top_logprobs": 0, "presence_penalty": 0, "frequency_penalty": 0,
    "repetition_penalty": 1, "top_k": -1, "min_p": 0, "logit_bias": {}, "tools": [],
    "tool_choice": "none", "modalities": ["text"],
}  # fmt: skip
# Fields of openai's answers that the next question's messages may have.
_ANSWERED = frozenset({"annotations", "audio", "function_call", "parsed", "refusal", "tool_calls"})
_CONTEXT = 2**30  # tokens; an answer is no longer than the context
_numbers = itertools.count(1)


def Client(vlm: EdgeVLM, **options: Any) -> openai.OpenAI:
    """Return an ``openai.OpenAI`` whose ``chat.completions`` and ``models`` an `EdgeVLM` answers.

    Messages are as `EdgeVLM.chat` takes them, with images and videos as base64 ``data:`` URLs; no
    URL is ever fetched and no file read. ``model`` is ignored. Answers are greedy unless
    ``temperature`` is given, and as long as the context allows unless ``max_tokens`` is.
    ``extra_body`` takes other options of `EdgeVLM.chat`, such as ``max_crops``; ``timeout`` is that
    of the whole answer. Leave a stream with ``with`` or ``close()``: one that is dropped is
    generated until Python collects it.

    Errors are openai's: BadRequestError for anything that this model, or molmo_edge, does not
    do, RateLimitError when the queue is full, APITimeoutError, and InternalServerError when the
    engine has died or the model computed NaN; while streaming, APIError for the last two.

    Args:
        vlm: stays open.
        options: of ``openai.OpenAI``; by default no request is repeated and none has a timeout.
    """
    http = httpx.Client(transport=_Transport(vlm))
    return openai.OpenAI(http_client=http, **{**_CLIENT_OPTIONS, **options})


def AsyncClient(vlm: EdgeVLM, **options: Any) -> openai.AsyncOpenAI:
    """`Client` for asyncio: an ``openai.AsyncOpenAI``."""
    http = httpx.AsyncClient(transport=_Transport(vlm))
    return openai.AsyncOpenAI(http_client=http, **{**_CLIENT_OPTIONS, **options})


_CLIENT_OPTIONS: Mapping[str, Any] = {
    "api_key": "none",
    "base_url": "http://molmo-edge.invalid/v1",
    "max_retries": 0,
    "timeout": None,
}


class _Transport(httpx.BaseTransport, httpx.AsyncBaseTransport):  # type: ignore[misc]
    """What answers the requests of a client."""

    def __init__(self, vlm: EdgeVLM) -> None:
        self._vlm = vlm
        self._model = str(vlm.environment.get("model"))

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if "/models" in request.url.path:
            return self._models(request)
        try:
            asked = _Asked(request, self._model)
            stream = self._vlm.chat_stream(asked.messages, **asked.options)
            if asked.stream:
                return _streamed(asked, stream)
            with stream:
                return httpx.Response(200, json=asked.completion(stream))
        except MolmoEdgeError as exc:
            return _refusal(exc)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if "/models" in request.url.path:
            return self._models(request)
        try:
            asked = _Asked(request, self._model)
            stream = await self._vlm.achat_stream(asked.messages, **asked.options)
            if asked.stream:
                return _streamed(asked, stream)
            async with stream:
                with suppress(GenerationError):  # which `completion` meets again
                    await stream.aresult()
                return httpx.Response(200, json=asked.completion(stream))
        except MolmoEdgeError as exc:
            return _refusal(exc)

    def _models(self, request: httpx.Request) -> httpx.Response:
        model = {"id": self._model, "object": "model", "created": 0, "owned_by": "molmo_edge"}
        every = {"object": "list", "data": [model]}
        return httpx.Response(200, json=every if request.url.path.endswith("/models") else model)


class _Asked:
    """The fields of one request, and what its answers have in common.

    Attributes:
        messages, options: of `EdgeVLM.chat`.
        stream: whether chunks are asked for.
    """

    def __init__(self, request: httpx.Request, model: str) -> None:
        asked = f"{request.method} {request.url.path}"
        if not (asked.startswith("POST") and asked.endswith("/chat/completions")):
            raise PromptError(f"molmo_edge answers chat completions, not {asked}.")
        given = {name: one for name, one in json.loads(request.read()).items() if one is not None}
        messages = given.pop("messages", ())
        # What is no list of messages is for `EdgeVLM.chat` to refuse.
        self.messages = [*map(_message, messages)] if isinstance(messages, list) else messages
        self.stream = bool(given.pop("stream", False))
        told = given.pop("stream_options", None)
        self._with_usage = isinstance(told, Mapping) and bool(told.get("include_usage"))
        if (limit := given.pop("max_completion_tokens", None)) is not None:
            given["max_tokens"] = limit
        if (schema := _schema(given.pop("response_format", {"type": "text"}))) is not None:
            given["json_schema"] = schema
        names = Options.__annotations__.keys() - {"logprobs"}  # which no answer here has
        self.options: dict[str, Any] = {name: given.pop(name) for name in names & given.keys()}
        self.options.setdefault("max_tokens", _CONTEXT)
        self.options.setdefault("timeout", request.extensions.get("timeout", {}).get("read"))
        refused = [
            name
            for name, one in given.items()
            if name not in _IGNORED and (name not in _NEUTRAL or one != _NEUTRAL[name])
        ]
        if refused:
            raise PromptError(f"molmo_edge has no {', '.join(refused)}; leave it out.")
        number, now = next(_numbers), int(time.time())
        self._common = {"id": f"chatcmpl-{number}", "created": now, "model": model}

    def completion(self, stream: Stream) -> dict[str, Any]:
        """The answer to come, whole."""
        text, reason, usage = self._end(stream)
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "finish_reason": reason, "message": message, "logprobs": None}
        kind = "chat.completion"
        return {**self._common, "object": kind, "choices": [choice], "usage": usage}

    def chunk(self, delta: Mapping[str, Any], reason: str | None = None) -> bytes:
        return self._chunk_event([{"index": 0, "delta": delta, "finish_reason": reason}], None)

    def last(self, stream: Stream) -> bytes:
        _, reason, usage = self._end(stream)
        counted = self._chunk_event([], usage) if self._with_usage else b""
        return self.chunk({}, reason) + counted + b"data: [DONE]\n\n"

    def _chunk_event(self, choices: list[Any], usage: Any) -> bytes:
        kind = "chat.completion.chunk"
        return _event({**self._common, "object": kind, "choices": choices, "usage": usage})

    def _end(self, stream: Stream) -> tuple[str, str, dict[str, int]]:
        """Text, finish reason and usage; of JSON that was cut off too, as a server does."""
        try:
            result = stream.result()
        except GenerationError as exc:
            if exc.result is None:
                raise
            result = exc.result
        prompt, answer = result.metrics.prompt_tokens or 0, result.metrics.output_tokens
        usage = {"prompt_tokens": prompt, "completion_tokens": answer}
        return result.text, result.finish_reason, {**usage, "total_tokens": prompt + answer}


def _message(given: Any) -> Any:
    """A message of text and ``data:`` URLs, without what only answers have."""
    if not isinstance(given, Mapping):
        return given
    content = given.get("content")
    for part in content if isinstance(content, list) else ():
        _check_part(part)
    empty = {name for name in _ANSWERED & given.keys() if name == "parsed" or not given[name]}
    return {name: one for name, one in given.items() if name not in empty}


def _check_part(part: Any) -> None:
    """Raise a PromptError for what names files, as parts of `EdgeVLM.chat` may, or other hosts."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in ("text", "image_url", "video_url"):
        raise PromptError("A part of a message is of type text, image_url or video_url.")
    url = part.get(kind)
    url = url.get("url") if isinstance(url, Mapping) else url
    if kind != "text" and not (isinstance(url, str) and url.startswith("data:")):
        raise PromptError(f"Give {kind} a base64 data: URL; molmo_edge fetches nothing.")


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


class _Events(httpx.SyncByteStream, httpx.AsyncByteStream):  # type: ignore[misc]
    """An answer as server-sent events."""

    def __init__(self, asked: _Asked, stream: Stream) -> None:
        self._asked, self._stream = asked, stream

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield self._asked.chunk({"role": "assistant", "content": ""})
            for text in self._stream:
                yield self._asked.chunk({"content": text})
            yield self._asked.last(self._stream)
        except MolmoEdgeError as exc:
            yield _event(_error(exc))

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            yield self._asked.chunk({"role": "assistant", "content": ""})
            async for text in self._stream:
                yield self._asked.chunk({"content": text})
            yield self._asked.last(self._stream)
        except MolmoEdgeError as exc:
            yield _event(_error(exc))

    def close(self) -> None:
        self._stream.cancel()

    async def aclose(self) -> None:
        self._stream.cancel()


def _streamed(asked: _Asked, stream: Stream) -> httpx.Response:
    kind = {"content-type": "text/event-stream"}
    return httpx.Response(200, headers=kind, stream=_Events(asked, stream))


def _event(content: Any) -> bytes:
    return f"data: {json.dumps(content)}\n\n".encode()


def _error(error: MolmoEdgeError) -> dict[str, Any]:
    """The body of a server's error. For a passed deadline, raises what httpx does."""
    if isinstance(error, RequestTimeout):
        raise httpx.ReadTimeout(str(error)) from error
    # A client has no chained error.
    cause = f" ({error.__cause__})" if error.__cause__ else ""
    about = {
        "message": f"{error}{cause}",
        "type": type(error).__name__,
        "param": None,
        "code": None,
    }
    return {"error": about}


def _refusal(error: MolmoEdgeError) -> httpx.Response:
    """What a server answers, for which the package raises its error."""
    status = 400
    if isinstance(error, QueueFull):
        status = 429
    elif isinstance(error, EngineError | GenerationError):
        status = 500
    return httpx.Response(status, json=_error(error))
