"""kanoa's interpreter on a model in this process, in place of a server's.

Extra ``kanoa``; for kanoa 0.6.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kanoa import AnalyticsInterpreter
from kanoa.backends.base import BaseBackend
from kanoa.core.types import InterpretationChunk, UsageInfo

from molmo_edge.errors import PromptTooLongError
from molmo_edge.vlm import EdgeVLM

NAME = "molmo_edge"


def interpreter(vlm: EdgeVLM, **options: Any) -> AnalyticsInterpreter:
    """Return kanoa's interpreter with `MolmoBackend`.

    Args:
        vlm: stays open.
        options: of ``kanoa.AnalyticsInterpreter``, such as ``kb_path`` and ``user_prompt``.
    """
    made = AnalyticsInterpreter(**{"backend": "vllm", **options})
    made.backend = MolmoBackend(
        vlm, max_tokens=made.backend.max_tokens, prompt_templates=made.backend.prompt_templates
    )
    made.backend_name = NAME
    return made


class MolmoBackend(BaseBackend):  # type: ignore[misc]
    """A backend of kanoa that asks an open `EdgeVLM`; costs are 0.

    Args:
        vlm: stays open.
        max_tokens: of an answer; fewer where the context is used up.
        options: of ``kanoa.backends.base.BaseBackend``.
    """

    def __init__(self, vlm: EdgeVLM, max_tokens: int = 3000, **options: Any) -> None:
        super().__init__(max_tokens=max_tokens, **options)
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
            PromptTooLongError: data or knowledge do not fit the context.
            As `EdgeVLM.query`.
        """
        self.call_count += 1
        about = {"model": self.model}
        yield InterpretationChunk(f"{self.model} is looking …", "status", metadata=about)
        prompt = self._build_prompt(context, focus, kb_context, custom_prompt)
        if data is not None:
            prompt = f"Data to analyze:\n{self._data_to_text(data)}\n\n{prompt}"
        try:
            stream = self._vlm.stream(fig, prompt, **{"max_tokens": self.max_tokens, **kwargs})
        except PromptTooLongError as exc:
            parts = {"the knowledge": kb_context, "the data": data, "the context": context}
            longest = max(parts, key=lambda name: len(str(parts[name] or "")))
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
