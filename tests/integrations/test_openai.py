"""Code that was written for a server, on a fake engine and with the real package's types."""

from __future__ import annotations

import asyncio
import base64
import io
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from PIL import Image

from molmo_edge import EdgeVLM
from molmo_edge.engine.fake import FakeEngine, FakeFactory, Fault
from molmo_edge.integrations.openai import AsyncClient, Client

JSON = '{"total": 12}'


def answer(turns: Any) -> str:
    text = turns[-1].text
    if text == "json":
        return JSON
    return f"{len(turns)} turns, {sum(len(turn.images) for turn in turns)} images"


@pytest.fixture
def fake() -> FakeFactory:
    return FakeEngine.factory(answer, step_s=0.002)


def data_url() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30)).save(buffer, "png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def asked(text: str = "What is it?", url: str | None = None) -> list[dict[str, Any]]:
    image = {"type": "image_url", "image_url": {"url": url or data_url(), "detail": "high"}}
    return [{"role": "user", "content": [image, {"type": "text", "text": text}]}]


def test_an_answer_has_the_types_of_the_package(vlm: EdgeVLM) -> None:
    client = Client(vlm)
    answered = client.chat.completions.create(
        model="anything", messages=asked(), max_tokens=50, temperature=0, n=1, user="me",
        tools=openai.NOT_GIVEN, logprobs=False, presence_penalty=0,
    )  # fmt: skip
    assert isinstance(answered, ChatCompletion) and answered.model == "fake"
    [choice] = answered.choices
    assert (choice.message.content, choice.finish_reason) == ("1 turns, 1 images", "stop")
    assert answered.usage is not None
    assert answered.usage.total_tokens == answered.usage.prompt_tokens + 5
    again = [*asked(), choice.message, {"role": "user", "content": "And now?"}]
    second = client.chat.completions.create(messages=again)
    assert second.choices[0].message.content == "3 turns, 1 images"
    assert second.id != answered.id
    short = client.chat.completions.create(messages=asked(), max_completion_tokens=2)
    assert short.choices[0].finish_reason == "length"


def test_a_stream_ends_with_its_reason_and_usage(vlm: EdgeVLM, fake: FakeFactory) -> None:
    create = Client(vlm).chat.completions.create
    with create(messages=asked(), stream=True, stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    assert all(isinstance(chunk, ChatCompletionChunk) for chunk in chunks)
    *said, last, usage = chunks
    assert said[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content for chunk in said) == "1 turns, 1 images"
    assert last.choices[0].finish_reason == "stop"
    assert usage.choices == [] and usage.usage.completion_tokens == 5
    stream = create(messages=asked(), stream=True)
    next(stream)
    stream.close()
    assert vlm.query(None, "x").text == "1 turns, 0 images"


def test_answers_follow_a_schema(vlm: EdgeVLM) -> None:
    create = Client(vlm).chat.completions.create
    schema = {"type": "object", "properties": {"total": {"type": "integer"}}}
    for given in (
        {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
        {"type": "json_object"},
    ):
        answered = create(messages=asked("json"), response_format=given)
        assert answered.choices[0].message.content == JSON
    cut = create(messages=asked("json"), response_format=given, max_tokens=1)
    assert (cut.choices[0].finish_reason, cut.choices[0].message.content) == ("length", '{"total":')


def test_the_twin_for_asyncio(vlm: EdgeVLM) -> None:
    async def body() -> None:
        create = AsyncClient(vlm).chat.completions.create
        answered = await create(messages=asked())
        assert answered.choices[0].message.content == "1 turns, 1 images"
        async with await create(messages=asked(), stream=True) as stream:
            chunks = [chunk async for chunk in stream]
        texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
        assert "".join(texts) == "1 turns, 1 images"
        with pytest.raises(openai.BadRequestError):
            await create(messages=[])

    asyncio.run(body())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"messages": asked(url="https://example.org/a.png")}, "fetches nothing"),
        ({"messages": asked(url="/etc/passwd")}, "fetches nothing"),
        ({"messages": asked(url="data:image/png;base64,AAAA")}, "image"),
        ({"messages": []}, "conversation is empty"),
        ({}, "conversation is empty"),
        ({"messages": [{"role": "system", "content": "Be short."}]}, "role must be"),
        ({"messages": asked(), "tools": [{"type": "function"}]}, "has no tools"),
        ({"messages": asked(), "n": 2}, "has no n"),
        ({"messages": asked(), "logprobs": True}, "has no logprobs"),
        ({"messages": asked(), "temperature": -1}, "temperature"),
        ({"messages": asked(), "response_format": {"type": "xml"}}, "response_format"),
        ({"messages": asked(), "response_format": "json"}, "response_format"),
    ],
)
def test_what_it_cannot_do_is_a_bad_request(
    vlm: EdgeVLM, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as error:
        Client(vlm).chat.completions.create(**arguments)
    assert error.value.status_code == 400 and message in error.value.message
    assert Client(vlm).chat.completions.create(messages=asked()).choices


def test_other_ends_are_the_errors_of_a_server() -> None:
    slow = FakeEngine.factory("a b c d", step_s=0.2)
    with (
        EdgeVLM(engine=slow, max_queue=1) as vlm,
        Client(vlm).chat.completions.create(messages=asked(), stream=True) as stream,
    ):
        next(stream)
        with pytest.raises(openai.RateLimitError):
            Client(vlm).chat.completions.create(messages=asked())
    with EdgeVLM(engine=slow) as vlm, pytest.raises(openai.APITimeoutError):
        Client(vlm).chat.completions.create(messages=asked(), timeout=0.1)
    broken = FakeEngine.factory("a", faults=[Fault("step", RuntimeError("broken"))])
    with EdgeVLM(engine=broken) as vlm, pytest.raises(openai.InternalServerError):
        Client(vlm).chat.completions.create(messages=asked())
