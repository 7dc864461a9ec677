"""kanoa's own interpreter, from a figure to text, usage and errors: on a fake engine, then vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import kanoa
import pandas as pd
import pytest
from matplotlib.figure import Figure

from molmo_edge import EdgeVLM
from molmo_edge.engine.fake import FakeEngine, FakeFactory
from molmo_edge.errors import ConfigError, PromptTooLongError
from molmo_edge.integrations.kanoa import MolmoBackend, interpreter


@pytest.fixture
def fake() -> FakeFactory:
    def answer(turns: Any) -> str:
        sizes = [image.size for image in turns[-1].images]
        return f"{len(sizes)} figures of width {sizes[0][0] if sizes else 0}"

    return FakeEngine.factory(answer, max_model_len=2000)


def figure() -> Figure:
    drawn = Figure(figsize=(3, 2), dpi=100)
    drawn.add_subplot().plot([1, 3, 2])
    return drawn


def test_a_figure_is_interpreted(vlm: EdgeVLM, fake: FakeFactory) -> None:
    asked = interpreter(vlm)
    assert isinstance(asked, kanoa.AnalyticsInterpreter)
    result = asked.interpret(
        fig=figure(), context="Monthly sales", focus="trend", stream=False, display_result=False
    )
    assert result.text.startswith("1 figures of width 2") and result.backend == "molmo_edge"
    assert "Monthly sales" in fake.engine.prompts[0] and "trend" in fake.engine.prompts[0]
    assert result.usage is not None and result.usage.cost == 0.0
    assert result.usage.input_tokens > 144 and result.usage.output_tokens == 6
    assert result.metadata == {"model": "fake", "finish_reason": "stop"}
    costs = asked.get_cost_summary()
    assert (costs["total_calls"], costs["total_cost_usd"]) == (1, 0.0)
    assert costs["total_tokens"]["output"] == 6


def test_chunks_are_a_status_text_and_usage(vlm: EdgeVLM) -> None:
    chunks = list(interpreter(vlm).interpret(fig=figure(), stream=True, display_result=False))
    kinds = [chunk.type for chunk in chunks]
    assert (kinds[0], set(kinds[1:-1]), kinds[-1]) == ("status", {"text"}, "usage")
    assert "".join(c.content for c in chunks if c.type == "text").startswith("1 figures")
    assert chunks[-1].is_final


def test_a_data_frame_custom_prompts_and_options(vlm: EdgeVLM, fake: FakeFactory) -> None:
    asked = interpreter(vlm, user_prompt="Three bullet points.", max_tokens=2)
    result = asked.interpret_dataframe(
        pd.DataFrame({"month": [1, 2], "sales": [10, 20]}), display_result=False
    )
    assert result.text == "0 figures" and result.metadata["finish_reason"] == "length"
    prompt = fake.engine.prompts[0]
    assert "sales" in prompt and "20" in prompt and prompt.endswith("Three bullet points.")
    asked.interpret(custom_prompt="Only this.", stream=False, display_result=False)
    assert fake.engine.prompts[1] == "Only this."
    assert asked.get_prompts()["user_prompt"] == "Three bullet points."


def test_options_are_kanoas_or_refused(vlm: EdgeVLM) -> None:
    with pytest.raises(ConfigError, match="has no model, top_k"):
        interpreter(vlm, model="gpt", top_k=5)
    warm = interpreter(vlm, temperature=0.7)
    with mock.patch.object(vlm, "stream", wraps=vlm.stream) as stream:
        warm.interpret(fig=figure(), stream=False, display_result=False)
        warm.interpret(fig=figure(), stream=False, display_result=False, temperature=0.2)
    assert [call.kwargs["temperature"] for call in stream.call_args_list] == [0.7, 0.2]


def test_knowledge_is_part_of_the_prompt_until_the_context_is_full(
    vlm: EdgeVLM, fake: FakeFactory, tmp_path: Path
) -> None:
    (tmp_path / "facts.md").write_text("Sales are in thousands of euros.")
    asked = interpreter(vlm, kb_path=tmp_path)
    asked.interpret(fig=figure(), stream=False, display_result=False)
    assert "thousands of euros" in fake.engine.prompts[0]
    full = asked.with_kb(kb_content="word " * 5000)
    with pytest.raises(PromptTooLongError, match="longest part is the knowledge"):
        full.interpret(fig=figure(), stream=False, display_result=False)
    frame = pd.DataFrame({name: range(3000) for name in "ab"})
    for part, given in (
        ("data", {"data": frame}),
        ("focus", {"focus": "word " * 5000}),
        ("prompt", {"custom_prompt": "word " * 5000}),
    ):
        with pytest.raises(PromptTooLongError, match=f"longest part is the {part}"):
            asked.interpret(**given, stream=False, display_result=False)
    text = MolmoBackend(vlm).interpret_blocking(None, None, None, None, None, "Hello?").text
    assert text == "0 figures of width 0"


@pytest.mark.engine
@pytest.mark.slow
def test_on_vllm_text_and_counts_are_those_of_query(stub_vlm: EdgeVLM) -> None:
    reader, question = interpreter(stub_vlm, max_tokens=4), "What is shown?"
    direct = stub_vlm.query(figure(), question, max_tokens=4)
    about = {"fig": figure(), "custom_prompt": question, "display_result": False}
    chunks = list(reader.interpret(**about, stream=True))
    with pytest.raises(PromptTooLongError, match="longest part is the knowledge"):
        reader.with_kb(kb_content="word " * 5000).interpret(
            fig=figure(), stream=False, display_result=False
        )
    # After the error too.
    answer = reader.interpret(**about, stream=False)
    streamed = "".join(chunk.content for chunk in chunks if chunk.type == "text")
    assert streamed == answer.text == direct.text != ""
    assert direct.metrics.image_tokens and direct.metrics.prompt_tokens
    for usage in (chunks[-1].usage, answer.usage):
        counts = (usage.input_tokens, usage.output_tokens)
        assert counts == (direct.metrics.prompt_tokens, direct.metrics.output_tokens)
    assert answer.usage.output_tokens == len(direct.token_ids) == 4
