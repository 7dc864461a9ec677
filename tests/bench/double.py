"""A double with the parts of `EdgeVLM` that a benchmark uses; it sleeps on a clock of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

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


class FakeClock:
    """Seconds that pass only when somebody works."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class DoubleVLM:
    """Answers at `speed(n)` decode tokens a second for its n-th request, n from 0.

    `failure(n)` may return an exception for the n-th request. `cached` is reported as the number
    of cached prompt tokens.
    """

    clock: FakeClock
    speed: Callable[[int], float] = lambda n: 50.0
    failure: Callable[[int], BaseException | None] = lambda n: None
    cached: int | None = 0
    text: str = "Ten, no: 10, then 15, 25 and 40."
    environment: dict[str, Any] = field(default_factory=lambda: dict(ENVIRONMENT))
    startup: dict[str, float] = field(default_factory=lambda: {"imports": 2.0, "build": 9.0})
    asked: list[tuple[Image.Image | None, str, dict[str, Any]]] = field(default_factory=list)
    resets: int = 0
    closed: bool = False

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> DoubleVLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.closed = True

    def reset_caches(self) -> None:
        self.resets += 1

    def query(self, image: Image.Image | None, text: str, **options: Any) -> Result:
        with self._lock:
            number = len(self.asked)
            self.asked.append((image, text, options))
            broken = self.failure(number)
            if broken is not None:
                self.clock.sleep(0.1)
                raise broken
            tokens, tps = options["max_tokens"], self.speed(number)
            self.clock.sleep(0.5 + (tokens - 1) / tps)
        decode = (tokens - 1) / tps
        return Result(
            text=self.text,
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
            options = {"max_tokens": request.max_tokens, "ignore_eos": request.ignore_eos}
            try:
                out.append(self.query(request.image, request.text, **options))
            except RequestError as exc:
                out.append(exc)
        return out
