"""`vllm serve` with the plugin answers over HTTP as `EdgeVLM` does in process."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import molmo_edge
from molmo_edge.models.hub import locate
from molmo_edge.points import parse_points


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number: int = free.getsockname()[1]
        return number


@pytest.fixture
def served(port: int, tmp_path: Path) -> Iterator[str]:
    """The address of a server of the demo."""
    arguments = ("--dtype", "float32", "--host", "127.0.0.1", "--max-model-len", "2048")
    limits = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    directory = locate("demo", tmp_path, "auto")
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory),
             *arguments, "--port", str(port), "--kv-cache-memory-bytes", str(2**28),
             "--max-num-seqs", "2", "--enforce-eager"],
            env={**os.environ, **limits}, stdout=log, stderr=log,
        )  # fmt: skip
        address = f"http://127.0.0.1:{port}"
        try:
            while server.poll() is None:
                with suppress(OSError), urllib.request.urlopen(f"{address}/health") as answer:
                    if answer.status == 200:
                        break
                time.sleep(0.3)
            assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
            yield address
        finally:
            server.terminate()
            server.wait(30)


def ask(address: str, image: Image.Image, question: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": question},
    ]
    body: dict[str, Any] = {"messages": [{"role": "user", "content": content}]}
    body |= {"temperature": 0, "max_tokens": 40}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        text: str = json.load(answer)["choices"][0]["message"]["content"]
        return text


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_served_model_answers_as_in_process(served: str) -> None:
    image = Image.open(Path(molmo_edge.__file__).parent / "bench" / "data" / "scene.png")
    # What the README says of the same questions in process, where test_examples.py asks them.
    assert ask(served, image, "Is there a green triangle?") == "Yes."
    assert ask(served, image, "What color is the square?") == "Blue."
    [star] = parse_points(ask(served, image, "Point to yellow star.")).points
    assert star.px(image.size) == (319, 102)
