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
from pydantic import BaseModel

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


MODEL = "anything"
FILE = {"type": "image", "image": __file__}


def asked(text: str = "What is it?", url: str | None = None) -> list[dict[str, Any]]:
    image = {"type": "image_url", "image_url": {"url": url or data_url(), "detail": "high"}}
    return [{"role": "user", "content": [image, {"type": "text", "text": text}]}]


def test_an_answer_has_the_types_of_the_package(vlm: EdgeVLM) -> None:
    client = Client(vlm)
    answered = client.chat.completions.create(
        model=MODEL, messages=asked(), max_tokens=50, temperature=0, n=1, user="me",
        tools=openai.NOT_GIVEN, logprobs=False, presence_penalty=0, tool_choice="none",
        extra_body={"top_k": -1, "repetition_penalty": 1.0},
    )  # fmt: skip
    assert isinstance(answered, ChatCompletion) and answered.model == "fake"
    [choice] = answered.choices
    assert (choice.message.content, choice.finish_reason) == ("1 turns, 1 images", "stop")
    assert answered.usage is not None
    assert answered.usage.total_tokens == answered.usage.prompt_tokens + 5
    again = [*asked(), choice.message, {"role": "user", "content": "And now?"}]
    second = client.chat.completions.create(model=MODEL, messages=again)
    assert second.choices[0].message.content == "3 turns, 1 images"
    assert second.id != answered.id
    short = client.chat.completions.create(model=MODEL, messages=asked(), max_completion_tokens=2)
    assert short.choices[0].finish_reason == "length"


def test_a_stream_ends_with_its_reason_and_usage(vlm: EdgeVLM, fake: FakeFactory) -> None:
    create = Client(vlm).chat.completions.create
    usage = {"include_usage": True}
    with create(model=MODEL, messages=asked(), stream=True, stream_options=usage) as stream:
        chunks = list(stream)
    assert all(isinstance(chunk, ChatCompletionChunk) for chunk in chunks)
    *said, last, counted = chunks
    assert said[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content for chunk in said) == "1 turns, 1 images"
    assert last.choices[0].finish_reason == "stop"
    assert counted.choices == [] and counted.usage.completion_tokens == 5
    stream = create(model=MODEL, messages=asked(), stream=True)
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
        answered = create(model=MODEL, messages=asked("json"), response_format=given)
        assert answered.choices[0].message.content == JSON
    cut = create(model=MODEL, messages=asked("json"), response_format=given, max_tokens=1)
    assert (cut.choices[0].finish_reason, cut.choices[0].message.content) == ("length", '{"total":')
    assert cut.usage is not None and cut.usage.completion_tokens == 1
    stopped = create(model=MODEL, messages=asked("json"), response_format=given, stop=["12"])
    assert (stopped.choices[0].finish_reason, stopped.usage.completion_tokens) == ("stop", 2)


class Total(BaseModel):
    total: int


# The package's own, of the message that it parsed.
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_the_rest_of_the_package_works(vlm: EdgeVLM, fake: FakeFactory) -> None:
    client = Client(vlm)
    [model] = client.models.list()
    assert model.id == "fake"
    parsed = client.chat.completions.parse(
        model=model.id, messages=asked("json"), response_format=Total
    )
    message = parsed.choices[0].message
    assert message.parsed == Total(total=12)
    again = [*asked(), message, {"role": "user", "content": "And now?"}]
    answered = client.chat.completions.create(model=MODEL, messages=again)
    assert answered.choices[0].message.content == "3 turns, 1 images"
    with client.chat.completions.stream(model=MODEL, messages=asked()) as events:
        assert events.get_final_completion().choices[0].message.content == "1 turns, 1 images"
    raw = client.with_options(max_retries=1).chat.completions.with_raw_response.create(
        model=MODEL, messages=asked(), extra_body={"max_crops": 2}
    )
    assert raw.parse().choices[0].message.content == "1 turns, 1 images"
    assert client.models.retrieve("fake") == model
    for ask in (lambda: client.embeddings.create(model=MODEL, input="x"),
                client.chat.completions.list):  # fmt: skip
        with pytest.raises(openai.BadRequestError, match="chat completions, not "):
            ask()


def test_the_twin_for_asyncio(vlm: EdgeVLM) -> None:
    async def body() -> None:
        create = AsyncClient(vlm).chat.completions.create
        answered = await create(model=MODEL, messages=asked())
        assert answered.choices[0].message.content == "1 turns, 1 images"
        async with await create(model=MODEL, messages=asked(), stream=True) as stream:
            chunks = [chunk async for chunk in stream]
        texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
        assert "".join(texts) == "1 turns, 1 images"
        with pytest.raises(openai.BadRequestError):
            await create(model=MODEL, messages=[])

    asyncio.run(body())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"messages": asked(url="https://example.org/a.png")}, "fetches nothing"),
        ({"messages": asked(url="/etc/passwd")}, "fetches nothing"),
        ({"messages": asked(url="data:image/png;base64,AAAA")}, r"image.*\(.*\)"),
        ({"messages": [{"role": "user", "content": [FILE]}]}, "is of type text, image_url or"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "is of type text, image_url or"),
        ({"messages": asked(), "extra_body": {"skip_special_tokens": False}}, "has no skip_spec"),
        ({"messages": asked(), "n": 0}, "has no n"),
        ({"messages": []}, "conversation is empty"),
        ({"messages": 5}, "messages must be a list"),
        ({"messages": ["Hello?"]}, "Message 1 must be a mapping"),
        ({"messages": asked(), "stream_options": 5, "seed": "x"}, "seed"),
        ({"messages": asked(), "extra_body": {"max_crops": 0}}, "max_crops"),
        ({"messages": asked(), "extra_body": {"top_k": 5}}, "has no top_k"),
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
        Client(vlm).chat.completions.create(**{"model": MODEL, **arguments})
    assert error.value.status_code == 400
    assert Client(vlm).chat.completions.create(model=MODEL, messages=asked()).choices


def test_other_ends_are_the_errors_of_a_server() -> None:
    slow = FakeEngine.factory("a b c d", step_s=0.2)
    with (
        EdgeVLM(engine=slow, max_queue=1) as vlm,
        Client(vlm).chat.completions.create(model=MODEL, messages=asked(), stream=True) as stream,
    ):
        next(stream)
        with pytest.raises(openai.RateLimitError):
            Client(vlm).chat.completions.create(model=MODEL, messages=asked())
    with EdgeVLM(engine=slow) as vlm, pytest.raises(openai.APITimeoutError):
        Client(vlm).chat.completions.create(model=MODEL, messages=asked(), timeout=0.1)
    with EdgeVLM(engine=slow) as vlm, pytest.raises(openai.APITimeoutError):
        list(Client(vlm, timeout=0.3).chat.completions.create(
            model=MODEL, messages=asked(), stream=True
        ))  # fmt: skip
    broken = FakeEngine.factory("a", faults=[Fault("step", RuntimeError("broken"))])
    with EdgeVLM(engine=broken) as vlm, pytest.raises(openai.APIError, match="engine"):
        list(Client(vlm).chat.completions.create(model=MODEL, messages=asked(), stream=True))
    with EdgeVLM(engine=broken) as vlm, pytest.raises(openai.InternalServerError):
        Client(vlm).chat.completions.create(model=MODEL, messages=asked())
