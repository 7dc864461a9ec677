"""Verbs that need Molmo's own prompts, and what is made of its answers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from typing import Any, Literal, Unpack, overload

from PIL import Image

from molmo_edge.asking import Asking
from molmo_edge.errors import ConfigError, PromptError
from molmo_edge.images import ImageLike
from molmo_edge.interface import Turn
from molmo_edge.points import CountResult, PointAnswer, parse_points
from molmo_edge.requests import Loader, Options
from molmo_edge.results import Result
from molmo_edge.stream import Stream
from molmo_edge.watch import Seen, Source, WatchOptions, arun, run

# The prompts Molmo was trained with (PixMo-Cap, PixMo-Points, PixMo-Count).
CAPTIONS: Mapping[str, str] = {
    "short": "Describe this image in one sentence.",
    "normal": "Describe this image.",
    "long": "Describe this image in detail.",
}
POINT = "Point to {label}"
COUNT = "How many {label} are there?"


class Verbs(Asking):
    """Caption, point, count and watch."""

    def supports(self, verb: str) -> bool:
        """Whether the model can do it: query, chat, caption, point, count."""
        return self.family is None or verb in self.family.verbs

    def caption(
        self,
        image: ImageLike,
        length: Literal["short", "normal", "long"] = "normal",
        **options: Unpack[Options],
    ) -> Result:
        """Describes a picture. Raises as `query`, and PromptError for another length."""
        self._require("caption")
        if length not in CAPTIONS:
            raise PromptError(f"length must be one of {', '.join(CAPTIONS)}.")
        return self.query(image, CAPTIONS[length], **options)

    @overload
    def point(self, image: ImageLike, label: str, **options: Unpack[Options]) -> PointAnswer: ...

    @overload
    def point(
        self, image: ImageLike, label: list[str] | tuple[str, ...], **options: Unpack[Options]
    ) -> list[PointAnswer]: ...

    def point(
        self, image: ImageLike, label: str | Sequence[str], **options: Unpack[Options]
    ) -> PointAnswer | list[PointAnswer]:
        """Points to what a label names.

        Args:
            image: as in `query`; its upright size is what ``Point.px`` wants.
            label: "the red mug"; lower-cased and stripped, as in training. Several
                labels are one batch, answered in order.
            options: see `Options`.

        Returns:
            A `PointResult` that also has `.result`; a list of them for a list of labels. An answer
            cut off by `max_tokens` is `truncated` and keeps its complete points.

        Raises:
            ConfigError: the model cannot point; `supports("point")` tells.
            PromptError: a label is empty, or holds markup or what cannot be printed.
            As `query`; the first failure of a batch ends the others.
        """
        self._require("point")
        single = isinstance(label, str)
        wanted = labels([label] if isinstance(label, str) else label)
        answers = self._pointed(image, POINT, wanted, options)
        return answers[0] if single else answers

    def count(self, image: ImageLike, label: str, **options: Unpack[Options]) -> CountResult:
        """Counts what a label names, by the points of the answer where it has any.

        Raises:
            ConfigError: the model cannot count; `supports("count")` tells.
            As `point`.
        """
        self._require("count")
        return CountResult.of(self._pointed(image, COUNT, labels([label]), options)[0])

    def watch(
        self,
        source: Source,
        question: str = CAPTIONS["short"],
        *,
        drop: Literal["oldest", "none"] = "oldest",
        max_fps: float | None = None,
        frame_timeout: float | None = 10.0,
        on_stall: Literal["raise", "reconnect"] = "raise",
        **options: Unpack[Options],
    ) -> Generator[Seen, None, None]:
        """Asks the same of a camera's newest frame, again and again.

        Args:
            source: see `molmo_edge.watch.WatchOptions`.
            question: what to ask of every frame.
            drop: ``"oldest"``: a frame that comes while another is answered replaces the one that
                waits; ``"none"``: the source is read only as fast as frames are answered.
            max_fps: most frames to ask about in a second.
            frame_timeout: seconds without a new frame after which the source has stalled; None
                waits for ever.
            on_stall: ``"raise"`` CameraError, or ``"reconnect"``: open the source again, with
                growing pauses, until it delivers.
            options: see `Options`; `timeout` is each frame's deadline, from the moment it is asked
                about, and a frame that misses it is yielded with `error`.

        Returns:
            An iterator of `Seen`, ending where the source ends. Closing it, or dropping it, closes
            the source and joins its thread.

        Raises, once iterated: CameraError, MissingDependencyError; and what `query` raises about
            the question, the options or the engine. ConfigError comes at once.
        """
        watched = WatchOptions(source, drop, max_fps, frame_timeout, on_stall)
        return run(watched, lambda image: self.query(image, question, **options))

    def awatch(
        self,
        source: Source,
        question: str = CAPTIONS["short"],
        *,
        drop: Literal["oldest", "none"] = "oldest",
        max_fps: float | None = None,
        frame_timeout: float | None = 10.0,
        on_stall: Literal["raise", "reconnect"] = "raise",
        **options: Unpack[Options],
    ) -> AsyncGenerator[Seen, None]:
        """`watch` for asyncio: ``async for`` over it; the event loop is never blocked.

        Leaving the loop early leaves the source open until the iterator is closed: use
        ``contextlib.aclosing`` where that matters.
        """
        watched = WatchOptions(source, drop, max_fps, frame_timeout, on_stall)
        return arun(watched, lambda image: self.aquery(image, question, **options))

    def _require(self, verb: str) -> None:
        if not self.supports(verb):
            assert self.family is not None
            raise ConfigError(
                f"This model's family, {self.family.name}, cannot {verb}; it supports "
                f"{', '.join(sorted(self.family.verbs))}. Use a Molmo checkpoint."
            )

    def _pointed(
        self, image: ImageLike, prompt: str, wanted: Sequence[str], options: Options
    ) -> list[PointAnswer]:
        # Loaded once for all labels, and kept for `draw`.
        loaded: list[Image.Image] = []

        def picture(load: Loader) -> Image.Image:
            if not loaded:
                loaded.append(load(image))
            return loaded[0]

        streams: list[Stream] = []
        try:
            for label in wanted:
                text = prompt.format_map({"label": label})
                streams.append(
                    self._open(
                        lambda load, text=text: [  # type: ignore[misc]
                            Turn("user", text, (picture(load),))
                        ],
                        options,
                        wait=len(wanted) > 1,
                    )
                )
            results = [stream.result() for stream in streams]
        finally:
            for stream in streams:
                stream.cancel()
        return [
            _answer(label, result, loaded[0])
            for label, result in zip(wanted, results, strict=True)
        ]


def labels(given: Sequence[Any]) -> list[str]:
    """Labels as the model knows them: lower-cased, stripped. Raises PromptError."""
    if isinstance(given, bytes) or not isinstance(given, Sequence) or not given:
        raise PromptError("Give a label, or a list of at least one label.")
    return [_label(one) for one in given]


def _label(given: Any) -> str:
    if not isinstance(given, str):
        raise PromptError(f"A label must be a str, not {type(given).__name__}.")
    label = " ".join(given.lower().split())
    if not label:
        raise PromptError("A label is empty; say what to look for, such as 'the red mug'.")
    if "<" in label or ">" in label or not label.isprintable():
        raise PromptError(
            "A label holds '<', '>' or characters that cannot be printed; it must be plain words."
        )
    return label


def _answer(label: str, result: Result, picture: ImageLike) -> PointAnswer:
    read = parse_points(
        result.text, truncated=result.finish_reason == "length", image=picture
    )
    return PointAnswer(
        text=read.text,
        points=read.points,
        stated_count=read.stated_count,
        none_found=read.none_found,
        truncated=read.truncated,
        malformed=read.malformed,
        image=picture,
        label=label,
        result=result,
    )
