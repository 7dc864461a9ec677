"""vLLM's server with the plugin, started as docs/serving.md says: its answers are the reference's.

It is plain vLLM with engine and model in processes of their own.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import openai
import pytest
from PIL import Image
from transformers import AutoTokenizer

import molmo_edge
from molmo_edge.interface import Turn
from molmo_edge.models.hub import locate
from molmo_edge.models.molmo.prompts import PromptEncoder
from molmo_edge.models.molmo.synthetic import CHAT_TEMPLATE, hub_config, write_checkpoint
from molmo_edge.models.molmo.tiling import tiling_for
from molmo_edge.points import parse_points
from molmo_edge.reference.verify import (
    EXACT_BOUND,
    QUESTION,
    Answer,
    Messages,
    compare,
    reference_answers,
    synthetic_image,
)
from molmo_edge.requests import question
from molmo_edge.video import write_video

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
LIMITS = (
    "--dtype float32 --max-model-len 2048 --kv-cache-memory-bytes 268435456 --max-num-seqs 2 "
    "--enforce-eager"
)
FPS = 4
SCHEMA = {
    "type": "object",
    "properties": {"total": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["total"],
    "additionalProperties": False,
}


class Server:
    """A server of one checkpoint, for the official client."""

    def __init__(self, directory: Path, log: Path, *options: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        [command] = re.findall(r"^python (-m vllm\.(?:\\\n|.)+)", PAGE.read_text(), re.MULTILINE)
        words = shlex.split(command.replace("\\\n", ""))
        words = [str(directory) if "fetch" in word else word for word in words]
        limits = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, *words, *LIMITS.split(), "--port", str(port), *options],
                env={**os.environ, **limits, "VLLM_NO_USAGE_STATS": "1"},
                stdout=file,
                stderr=file,
            )
        self.log = log
        address = f"http://127.0.0.1:{port}/v1"
        self.client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)

    def wait(self) -> None:
        while True:
            try:
                self.client.models.list()
            except openai.APIConnectionError:
                assert self.process.poll() is None, self.log.read_text()[-3000:]
                time.sleep(0.3)
            else:
                return

    def ask(self, messages: Messages, max_tokens: int = 40, **options: Any) -> Any:
        return self.client.chat.completions.create(
            model="molmo", messages=encoded(messages), max_tokens=max_tokens, logprobs=True,
            extra_body={"return_token_ids": True, **options.pop("extra", {})}, **options,
        )  # fmt: skip

    def check(self, expected: Mapping[str, Answer], requests: Mapping[str, Messages]) -> None:
        """Compare the answers with the reference's, token for token and in log-probabilities."""
        for name, want in expected.items():
            answer = self.ask(requests[name], len(want.token_ids))
            [choice] = answer.choices
            logprobs = [token.logprob for token in choice.logprobs.content]
            got = Answer(answer.prompt_token_ids, choice.token_ids, logprobs, logprobs)
            case = compare(name, want, got, True, EXACT_BOUND)
            assert case.ok, case


@contextmanager
def started(*arguments: Any) -> Iterator[Server]:
    server = Server(*arguments)
    try:
        yield server
    finally:
        server.process.terminate()
        server.process.wait(30)
        server.client.close()


def encoded(messages: Messages) -> Any:
    """The messages as a client sends them: images as PNG, a video as the file."""

    def part(one: Mapping[str, Any]) -> Mapping[str, Any]:
        if one["type"] == "text":
            return one
        data, kind = one[one["type"]], "video/mp4"
        if one["type"] == "image":
            buffer, kind = io.BytesIO(), "image/png"
            Image.fromarray(np.asarray(data)).save(buffer, "png")
            data = buffer.getvalue()
        url = f"data:{kind};base64,{base64.b64encode(data).decode()}"
        return {"type": f"{one['type']}_url", f"{one['type']}_url": {"url": url}}

    def content(given: Any) -> Any:
        return given if isinstance(given, str) else [part(one) for one in given]

    return [{**message, "content": content(message["content"])} for message in messages]


def test_molmo_2_answers_as_the_reference(tmp_path: Path) -> None:
    scene = np.asarray(Image.open(Path(molmo_edge.__file__).parent / "bench/data/scene.png"))
    clip = tmp_path / "clip.mp4"
    write_video(clip, [np.roll(scene, 7 * i, axis=1) for i in range(9)], FPS)
    is_there = question(scene, "Is there a green triangle?")
    retry = [
        *question([scene, scene[:, ::-1]], "Point to yellow star."),
        # As LeRobot asks again.
        {"role": "assistant", "content": "Here."},
        {"role": "user", "content": "Reply with strictly valid JSON, no prose, no fences."},
    ]
    requests = {
        "image": is_there,
        "images": question([scene, scene[:, ::-1], scene[::-1]], "Point to yellow star."),
        "retry": retry,
        "text": question(None, "Is this an image?"),
        "video": question(None, "Track the yellow star.", clip.read_bytes()),
    }
    directory = locate("demo", tmp_path, "auto")
    with started(directory, tmp_path / "log") as server:
        expected = reference_answers(directory, requests, 12)
        server.wait()
        server.check(expected, requests)
        [star] = parse_points(
            server.ask(question(scene, "Point to yellow star.")).choices[0].message.content
        ).points
        assert star.px(scene.shape[1::-1]) == (319, 102)
        broken = question(None, "Track the yellow star.", b"\0\0\0\x18ftypmp42")
        with pytest.raises(openai.BadRequestError, match="video"):
            server.ask(broken)
        form = {"type": "json_schema", "json_schema": {"name": "total", "schema": SCHEMA}}
        answer = server.ask(question(scene, "How many red circles?"), response_format=form)
        jsonschema.validate(json.loads(answer.choices[0].message.content), SCHEMA)


def test_molmo_1_answers_as_the_reference(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "molmo-o", hub_config("7b-o"))
    pixels = synthetic_image(224, 460, 0)
    requests = {"image": question(pixels, QUESTION), "text": question(None, QUESTION)}
    trusted = ("--trust-request-mm-kwargs", "--trust-request-chat-template")
    with started(directory, tmp_path / "log", *trusted) as server:
        expected = reference_answers(directory, requests, 4)
        server.wait()
        server.check(expected, requests)
        turns = [*requests["text"], {"role": "assistant", "content": "A mug."}, *requests["text"]]
        encoder = PromptEncoder(AutoTokenizer.from_pretrained(directory), 2048)
        said = [Turn("user", QUESTION), Turn("assistant", "A mug."), Turn("user", QUESTION)]
        assert server.ask(turns, 1).prompt_token_ids == [encoder.bos, *encoder.encode(said)]
        # max_crops reaches pixels and tokens alike; a template without BOS gets it all the same.
        few = {"mm_processor_kwargs": {"max_crops": 1}, "chat_template": CHAT_TEMPLATE}
        ids = server.ask(requests["image"], 1, extra=few).prompt_token_ids
        bos, *text = expected["text"].prompt
        assert (ids[0], ids[-len(text) :]) == (bos, text)
        assert len(ids) - 1 - len(text) == tiling_for(224, 460, 1).n_tokens
        with pytest.raises(openai.BadRequestError, match="image"):
            server.ask(question([pixels, pixels], QUESTION))
