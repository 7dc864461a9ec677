"""The way of every request: options checked, rendered in the caller's thread, handed to the engine.

Knows nothing of how an engine is built, nor of what is asked.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

from PIL import Image

from molmo_edge.engine.loop import EngineLoop
from molmo_edge.engine.pending import Ticket
from molmo_edge.engine.pool import RenderPool
from molmo_edge.engine.vllm_errors import mapped
from molmo_edge.images import ImageLike, ImageLimits, load
from molmo_edge.interface import ModelFamily, Turn
from molmo_edge.requests import Asked, Loader, Options, check_options
from molmo_edge.settings import EdgeSettings
from molmo_edge.stream import Stream

Turns: TypeAlias = Callable[[Loader], list[Turn]]
"""Makes a request's turns with the loader it is given; called in the thread that renders."""


class Opening:
    """Opens requests on the engine that `EdgeVLM` keeps."""

    settings: EdgeSettings
    family: ModelFamily | None
    _limits: ImageLimits
    _loop: EngineLoop
    _pool: RenderPool
    _ids: itertools.count[int]

    def _open(self, turns: Turns, options: Options, *, wait: bool = False) -> Stream:
        """Checks the options, then as `_submit`."""
        return self._submit(turns, check_options(options, self.settings.max_crops), wait=wait)

    async def _aopen(self, turns: Turns, options: Options, *, wait: bool = False) -> Stream:
        """As `_open`; renders and waits without blocking the event loop."""
        asked, started = check_options(options, self.settings.max_crops), time.monotonic()
        loop = self._loop
        loop.engine  # noqa: B018 - raises when there is none, rather than from the pool
        ticket = await self._pool.run(
            lambda: self._render(loop, turns, asked, (), started), asked.timeout
        )
        stream = Stream(loop, ticket, asked.read)
        await loop.async_submit(ticket, wait=wait)
        return stream

    def _submit(
        self,
        turns: Turns,
        asked: Asked,
        *,
        answer: Sequence[int] = (),
        wait: bool = False,
    ) -> Stream:
        """Renders in this thread and hands over; `wait` for room in a full queue."""
        loop = self._loop
        ticket = self._render(loop, turns, asked, answer, time.monotonic())
        # Before it is handed over, so that Ctrl-C in between leaves nothing in the engine.
        stream = Stream(loop, ticket, asked.read)
        try:
            loop.submit(ticket, wait=wait)
        except BaseException:
            stream.cancel()
            raise
        return stream

    def _load(self, image: ImageLike) -> Image.Image:
        return load(image, self._limits)

    def _render(
        self,
        loop: EngineLoop,
        turns: Turns,
        asked: Asked,
        answer: Sequence[int],
        started: float,
    ) -> Ticket:
        engine = loop.engine
        if asked.sampling.json_schema is not None:
            engine.check_schema(asked.sampling.json_schema)
        with mapped("render"):
            rendered = engine.render(
                turns(self._load),
                {"max_crops": asked.max_crops, "answer": answer},
            )
        return Ticket(
            f"request-{next(self._ids)}",
            rendered,
            asked.sampling,
            started=started,
            preprocess_s=time.monotonic() - started,
            deadline=None if asked.timeout is None else started + asked.timeout,
            environment=engine.info.environment,
        )
