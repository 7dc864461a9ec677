"""What a model family is: the seam between `EdgeVLM` and the models it runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from molmo_edge.engine.seam import Rendered

# As in `EdgeSettings.resize`.
Resize = Literal["torch", "tensorflow", "fast"]


class Renderer(Protocol):
    """Turns to engine input, in any thread."""

    def render(self, turns: Any, options: Mapping[str, Any]) -> Rendered:
        """See `Engine.render`."""
        ...


class Family(Protocol):
    """One model family; without state.

    Attributes:
        name: as it stands in results and reports.
        verbs: the methods of `EdgeVLM` that make sense.
        max_images: most pictures of one request.
        crops: whether `max_crops`, `resize` and `jpeg_scale` mean something.
        unquantized: module patterns of the vision tower, which online quantisation leaves alone.
    """

    name: str
    verbs: frozenset[str]
    max_images: int
    crops: bool
    unquantized: tuple[str, ...]

    def check(self, config: Mapping[str, Any], folder: Path, load_format: str) -> None:
        """Raises ModelError for a checkpoint that this family cannot run."""
        ...

    def engine_args(self, max_crops: int, resize: Resize) -> dict[str, Any]:
        """Arguments of `vllm.LLM` that the family needs."""
        ...

    def scaled_size(self, size: tuple[int, int], max_crops: int) -> tuple[int, int] | None:
        """(width, height) that a picture of `size` is scaled to at most; None where unknown."""
        ...

    def prepare(self) -> None:
        """What vLLM must be told before it reads the checkpoint; once per engine, may repeat."""
        ...

    def renderer(self, llm: Any, max_crops: int, resize: Resize) -> Renderer:
        """Built in the engine's thread, used in every other."""
        ...
