"""kanoa's interpreter on a model in this process, in place of a server's.

Extra ``kanoa``; for kanoa 0.6.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from kanoa import AnalyticsInterpreter
from kanoa.backends.base import BaseBackend
from kanoa.core.types import InterpretationChunk, UsageInfo

from molmo_edge.errors import ConfigError, PromptTooLongError
from molmo_edge.vlm import EdgeVLM

NAME = "molmo_edge"


def interpreter(vlm: EdgeVLM, *, temperature: float = 0.0, **options: Any) -> AnalyticsInterpreter:
    """Return kanoa's interpreter with `MolmoBackend`.

    Args:
        vlm: stays open.
        temperature: of answers.
        options: of ``kanoa.AnalyticsInterpreter``, such as ``kb_path`` and ``user_prompt``.

    Raises:
        ConfigError: an option that `EdgeVLM` has itself, or that there is not.
    """
    known = inspect.signature(AnalyticsInterpreter).parameters.keys() - {"backend", "api_key"}
    if refused := sorted(options.keys() - known):
        raise ConfigError(f"The interpreter has no {', '.join(refused)}; EdgeVLM has the model.")
    # Its own backend asks nobody, and gives way at once.
    made = AnalyticsInterpreter(backend="vllm", api_key="none", **options)
    made.backend = MolmoBackend(
        vlm,
        max_tokens=made.backend.max_tokens,
        temperature=temperature,
        prompt_templates=made.backend.prompt_templates,
    )
    made.backend_name = NAME
    return made


class MolmoBackend(BaseBackend):  # type: ignore[misc]
    """A backend of kanoa that asks an open `EdgeVLM`; costs are 0.

    Args:
        vlm: stays open.
        max_tokens: of an answer; fewer where the context is used up.
        temperature: of answers.
        options: of ``kanoa.backends.base.BaseBackend``.
    """

    def __init__(
        self, vlm: EdgeVLM, max_tokens: int = 3000, temperature: float = 0.0, **options: Any
    ) -> None:
        super().__init__(max_tokens=max_tokens, **options)
        self.temperature = temperature
        self._vlm = vlm
        self.model = str(vlm.environment.get("model"))

    @property
    def backend_name(self) -> str:
        return NAME

    def interpret(
        self,
        fig: Any,
        data: Any,
        context: str | None,
        focus: str | None,
        kb_context: str | None,
        custom_prompt: str | None,
        **kwargs: Any,
    ) -> Iterator[InterpretationChunk]:
        """Yield a status, the text as it is generated, and the tokens used.

        Args:
            fig: a matplotlib figure, or whatever `EdgeVLM.query` takes.
            kwargs: options of `EdgeVLM.query`, such as ``temperature``.

        Raises:
            PromptTooLongError: the prompt does not fit the context; it names the longest part.
            As `EdgeVLM.query`.
        """
        self.call_count += 1
        about = {"model": self.model}
        yield InterpretationChunk(f"{self.model} is looking …", "status", metadata=about)
        prompt = self._build_prompt(context, focus, kb_context, custom_prompt)
        table = None if data is None else self._data_to_text(data)
        if table is not None:
            prompt = f"Data to analyze:\n{table}\n\n{prompt}"
        options = {"max_tokens": self.max_tokens, "temperature": self.temperature, **kwargs}
        try:
            stream = self._vlm.stream(fig, prompt, **options)
        except PromptTooLongError as exc:
            parts = {"the knowledge": kb_context, "the context": context, "the focus": focus}
            if custom_prompt:  # in place of all of them
                parts = {"the prompt": custom_prompt}
            parts["the data"] = table
            longest = max(parts, key=lambda name: len(parts[name] or ""))
            raise PromptTooLongError(f"{exc} The longest part is {longest}.") from exc
        with stream:
            for text in stream:
                yield InterpretationChunk(text, "text")
            result = stream.result()
        usage = UsageInfo(
            input_tokens=result.metrics.prompt_tokens or 0,
            output_tokens=result.metrics.output_tokens,
            cost=0.0,
            model=self.model,
        )
        self.total_tokens["input"] += usage.input_tokens
        self.total_tokens["output"] += usage.output_tokens
        about["finish_reason"] = result.finish_reason
        yield InterpretationChunk("", "usage", is_final=True, usage=usage, metadata=about)

    def _build_prompt(
        self,
        context: str | None,
        focus: str | None,
        kb_context: str | None,
        custom_prompt: str | None,
    ) -> str:
        prompt: str = self._build_prompt_from_templates(context, focus, kb_context, custom_prompt)
        return prompt
