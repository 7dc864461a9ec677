"""The fake engine: its promises to people who test with it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from molmo_edge.engine.fake import FakeEngine
from molmo_edge.errors import ImageError, PromptError, PromptTooLongError
from tests.engine.support import opened

pytestmark = pytest.mark.timeout(60)
IMAGE = np.zeros((8, 8, 3), np.uint8)


def test_it_loads_neither_torch_nor_vllm() -> None:
    script = (
        "import sys\n"
        "from molmo_edge import EdgeVLM\n"
        "from molmo_edge.engine.fake import FakeEngine\n"
        "with EdgeVLM(engine=FakeEngine.factory()) as vlm:\n"
        "    assert vlm.query(None, 'hello').text\n"
        "loaded = {'torch', 'vllm', 'transformers'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize(
    ("answers", "answer"),
    [
        ("Always.", "Always."),
        ({"a": "A.", "": "Else."}, "A."),
        ({"b": "B.", "": "Else."}, "Else."),
        (lambda turns: f"{len(turns)} turns", "1 turns"),
        ({"b": "B."}, None),
    ],
)
def test_answers_come_from_a_string_a_mapping_or_a_function(
    answers: Any, answer: str | None
) -> None:
    with opened(FakeEngine.factory(answers)) as vlm:
        if answer is None:
            with pytest.raises(PromptError):
                vlm.query(None, "a")
        else:
            assert vlm.query(None, "a").text == answer


def test_max_tokens_stop_strings_and_the_context_end_an_answer() -> None:
    with opened(FakeEngine.factory("one two three four", max_model_len=8)) as vlm:
        cut = vlm.query(None, "q", max_tokens=2)
        assert (cut.text, cut.finish_reason, len(cut.token_ids)) == ("one two", "length", 2)
        stopped = vlm.query(None, "q", stop=["ee f", "two"])
        assert (stopped.text, stopped.finish_reason) == ("one ", "stop")
        full = vlm.query(None, "q")  # four tokens of prompt leave four for the answer
        assert (full.finish_reason, full.metrics.output_tokens) == ("length", 4)
        endless = vlm.query(None, "q", ignore_eos=True, max_tokens=3)
        assert endless.metrics.output_tokens == 3
    with opened(FakeEngine.factory("say END of it", pieces="chars")) as vlm:
        assert "".join(vlm.stream(None, "q", stop=" END of")) == "say"


def test_log_probabilities_are_aligned_with_tokens() -> None:
    with opened(FakeEngine.factory("one two")) as vlm:
        result = vlm.query(None, "q", logprobs=3)
        assert result.logprobs is not None and result.top_logprobs is not None
        assert len(result.logprobs) == len(result.top_logprobs) == len(result.token_ids) == 3
        for token, logprob, top in zip(
            result.token_ids, result.logprobs, result.top_logprobs, strict=True
        ):
            assert top[token] == logprob < 0
        assert vlm.query(None, "q").logprobs is None


def test_it_refuses_what_the_real_engine_refuses() -> None:
    with opened(FakeEngine.factory(max_model_len=64)) as vlm:
        for text, kind in [
            ("look: <im_patch>", PromptError),
            (" ", PromptError),
            ("word " * 64, PromptTooLongError),
        ]:
            with pytest.raises(kind):
                vlm.query(None, text)
        with pytest.raises(PromptTooLongError):
            vlm.query(IMAGE, "what is it?")
        with pytest.raises(ImageError):
            vlm.chat(
                [
                    {"role": "user", "content": "hello"},
                    {"role": "assistant", "content": "hello"},
                    {"role": "user", "content": [{"type": "image", "image": IMAGE},
                                                 {"type": "text", "text": "what?"}]},
                ]
            )
        assert vlm.query(None, "hello").text
