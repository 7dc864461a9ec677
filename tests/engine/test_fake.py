"""The fake engine: its promises to people who test with it."""

from __future__ import annotations

import numpy as np
import pytest

from molmo_edge.engine.fake import FakeEngine
from molmo_edge.errors import InputError, PromptError, PromptTooLongError
from tests.engine.support import opened

pytestmark = pytest.mark.timeout(60)
IMAGE = np.zeros((8, 8, 3), np.uint8)


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
        logprobs, tops = result.logprobs or (), result.top_logprobs or ()
        for token, logprob, top in zip(result.token_ids, logprobs, tops, strict=True):
            assert top[token] == logprob < 0
        assert vlm.query(None, "q").logprobs is None


def test_a_scripted_answer_is_the_choice() -> None:
    script = {"Open?": "no", "Where?": "on the desk", "": "What?"}
    with opened(FakeEngine.factory(script)) as vlm:
        assert str(vlm.choose(None, "Open?", ["yes", "no"])) == "no"
        assert str(vlm.choose(None, "Where?", ["on the table", "under it", "on the desk"])) == (
            "on the desk"
        )
        even = vlm.choose(None, "Else?", ["yes", "no"])
        assert even.choice == "yes" and even.probabilities == {"yes": 0.5, "no": 0.5}


@pytest.mark.parametrize(
    ("image", "text", "kind"),
    [
        (None, "look: <im_patch>", PromptError),
        (None, " ", PromptError),
        (None, "word " * 64, PromptTooLongError),
        (IMAGE, "what is it?", PromptTooLongError),
        (None, "no answer", PromptError),
    ],
)
def test_it_refuses_what_the_real_engine_refuses(
    image: np.ndarray | None, text: str, kind: type[InputError]
) -> None:
    with opened(FakeEngine.factory({"hello": "Hello."}, max_model_len=64)) as vlm:
        with pytest.raises(kind):
            vlm.query(image, text)
        assert vlm.query(None, "hello").text == "Hello."
