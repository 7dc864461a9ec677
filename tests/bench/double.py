"""A double with the parts of `EdgeVLM` that a benchmark uses; it sleeps on a clock of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from PIL import Image

from molmo_edge.bench import scenarios
from molmo_edge.bench.cases import Case
from molmo_edge.bench.document import Document
from molmo_edge.bench.measure import Bench, RunOptions
from molmo_edge.errors import RequestError
from molmo_edge.results import Metrics, Result

ENVIRONMENT = {
    "vllm": "0.32.0",
    "torch": "2.13.0+cpu",
    "transformers": "5.17.0",
    "python": "3.11.7",
    "molmo_edge": "0.1.0",
    "model": "double",
    "device": "a test",
    "precision": "bf16",
    "kv_cache_dtype": "fp8",
    "random_weights": True,
    "profile": "cpu",
}
CASES = (
    Case("one", "One", "What?", Image.new("RGB", (8, 6)), ("10", "15")),
    Case("two", "Two", "Why?", Image.new("RGB", (6, 8), (9, 9, 9))),
)
SETTINGS = SimpleNamespace(load_format="auto", max_num_seqs=8)
OPTIONS = RunOptions(iterations=6, max_iterations=12, max_tokens=20)


class FakeClock:
    """Seconds that pass only when somebody works."""

    now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class DoubleVLM:
    """Answers at `speed(n)` decode tokens per second for its n-th request, n from 0.

    `failure(n)` may return an exception for the n-th request; `cached` is the reported number of
    cached prompt tokens. Every request takes 0.5 s to its first token.
    """

    clock: FakeClock = field(default_factory=FakeClock)
    speed: Callable[[int], float] = lambda n: 50.0
    failure: Callable[[int], BaseException | None] = lambda n: None
    cached: int | None = 0
    settings: Any = field(default_factory=lambda: SETTINGS)
    shape: None = None
    video: bool = True
    environment: dict[str, Any] = field(default_factory=lambda: dict(ENVIRONMENT))
    startup: dict[str, float] = field(default_factory=lambda: {"imports": 2.0, "engine": 9.0})
    requests: int = 0
    images: list[bytes] = field(default_factory=list)
    resets: int = 0
    _one: Any = field(default_factory=threading.Lock)

    def __enter__(self) -> DoubleVLM:
        return self

    def __exit__(self, *exc: object) -> None: ...

    def reset_caches(self) -> None:
        self.resets += 1

    def supports(self, verb: str) -> bool:
        return self.video or verb != "video"

    def query(self, image: Image.Image | None, text: str, **options: Any) -> Result:
        with self._one:  # users may be many, the clock is one
            return self._answer(image, text, options)

    def _answer(self, image: Image.Image | None, text: str, options: dict[str, Any]) -> Result:
        number = self.requests
        self.requests += 1
        image = options["video"].frames[0] if "video" in options else image
        if image is not None:
            self.images.append(image.tobytes())
        if (error := self.failure(number)) is not None:
            self.clock.sleep(0.1)
            raise error
        tokens, tps = options["max_tokens"], self.speed(number)
        decode = (tokens - 1) / tps
        self.clock.sleep(0.5 + decode)
        return Result(
            text="Ten, no: 10, then 15, 25 and 40.",
            finish_reason="length",
            token_ids=tuple(range(tokens)),
            metrics=Metrics(
                queue_s=0.1,
                preprocess_s=0.15,
                ttft_s=0.5,
                itl_s=(1 / tps,) * (tokens - 1),
                tpot_s=1 / tps,
                e2e_s=0.5 + decode,
                prompt_tokens=1210 if image is not None else 20,
                image_tokens=1190 if image is not None else 0,
                output_tokens=tokens,
                cached_tokens=self.cached,
                output_tps=tps,
                request_tps=tokens / (0.5 + decode),
            ),
        )

    def batch(
        self, requests: Sequence[Any], *, return_exceptions: bool
    ) -> list[Result | RequestError]:
        assert return_exceptions
        out: list[Result | RequestError] = []
        for request in requests:
            try:
                out.append(self.query(request.image, request.text, **request.options))
            except RequestError as exc:
                out.append(exc)
        return out


def make_bench(vlm: DoubleVLM, **more: Any) -> Bench:
    """A run on the double's clock."""
    defaults = {"cases": CASES, "options": OPTIONS, "clock": vlm.clock, "sleep": vlm.clock.sleep}
    return Bench(**{**defaults, **more})


def measure(vlm: DoubleVLM, *names: str, **more: Any) -> Document:
    """The result of scenarios on the double, by default of "report"."""
    return scenarios.run(make_bench(vlm, **more), lambda caches: vlm, names or ("report",))
