"""What a caller asks for: `Request`, its options, chat messages, and the checks on all of them.

vLLM masks the tokens that would break a JSON Schema; this module only prepares the schema and reads
the answer.
"""

from __future__ import annotations

import inspect
import json
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Generic, Literal, TypeAlias, TypedDict, Unpack, cast

import numpy as np
from pydantic import BaseModel, Field, ValidationError
from pydantic.errors import PydanticUserError
from typing_extensions import TypeVar

from molmo_edge.errors import (
    GenerationError,
    PromptError,
    PromptTooLongError,
    SamplingError,
    did_you_mean,
)
from molmo_edge.images import ImageLike, ImageLimits, load
from molmo_edge.interface import PROMPTS, Turn
from molmo_edge.points import CountResult, PointResult, TrackResult, parse_points
from molmo_edge.results import Choice, Result
from molmo_edge.sampling import Sampling
from molmo_edge.settings import EdgeSettings, describe, plain
from molmo_edge.video import Clip, VideoLike

# What `EdgeVLM.batch` answers a request with.
A_co = TypeVar("A_co", covariant=True, default=Result)
JsonSchema: TypeAlias = Mapping[str, Any] | type[BaseModel]
# One image, or several as a list or tuple.
Images: TypeAlias = ImageLike | Sequence[ImageLike]
Length: TypeAlias = Literal["short", "normal", "long"]

# The prompts Molmo was trained with (PixMo-Cap).
CAPTION_PROMPTS: Mapping[str, str] = {
    "short": "Describe this image in one sentence.",
    "normal": "Describe this image.",
    "long": "Describe this image in detail.",
}
# vLLM scores at most 128 tokens in one place.
MAX_CHOICES = 100
# Of all choices together: each is a request, but for beginnings that choices share.
MAX_CHOICE_TOKENS = 1000
MEDIA_IN_MESSAGES = "A conversation has its images and video in its messages."
ONE_VIDEO = "A conversation can have images, or one video, but not both."


class Options(TypedDict, total=False):
    """Options of one request; `Sampling` describes those not listed here.

    Attributes:
        json_schema: a JSON Schema, or a pydantic model class, that the answer must follow;
            `Result.parsed` is then its value. An answer that is cut off before it is complete is a
            GenerationError, which keeps the text in `.partial`.
        max_crops: high-resolution crops of the image, at least 1; fewer answer sooner.
        timeout: seconds for the whole request: queueing, prefill and decode.
    """

    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: Sequence[str] | str
    logprobs: int | None
    json_schema: JsonSchema | None
    ignore_eos: bool
    max_crops: int | None
    timeout: float | None


class VideoOptions(Options, total=False):
    """Options of a request that may be about a video.

    Attributes:
        video: path, bytes or `Video`, in place of images.
    """

    video: VideoLike | None


class ChoiceOptions(TypedDict, total=False):
    """Options of `EdgeVLM.choose`, which generates nothing.

    Attributes:
        video: path, bytes or `Video`, in place of images.
        max_crops: high-resolution crops of the image, at least 1; fewer answer sooner.
        timeout: seconds for the whole choice.
    """

    video: VideoLike | None
    max_crops: int | None
    timeout: float | None


class Request(Generic[A_co]):
    """One item of a batch: a question, as `EdgeVLM.query` takes it.

    The static methods make requests of the other kinds, from the arguments of the methods of
    `EdgeVLM` of the same names; the answer is what those return.
    """

    def __init__(
        self: Request[Result], image: Images | None, text: str, **options: Unpack[VideoOptions]
    ) -> None:
        self.verb = "query"
        self.image = image
        self.text = text
        self.video = options.pop("video", None)
        self.options: Mapping[str, Any] = options
        self.messages: Sequence[Mapping[str, Any] | Turn] = question(image, text, self.video)
        self.choices: Sequence[str] = ()

    @staticmethod
    def chat(messages: Sequence[Mapping[str, Any]], **options: Unpack[Options]) -> Request[Result]:
        """A conversation."""
        request = Request(None, "")._as("chat")
        request.options = options  # with `video`, to be refused like any other unknown one
        request.messages = messages
        return request

    @staticmethod
    def caption(
        image: ImageLike, length: Length = "normal", **options: Unpack[Options]
    ) -> Request[Result]:
        """A description of an image."""
        request = Request(image, length)._as("caption")
        request.options = options
        return request

    @staticmethod
    def point(
        image: Images | None = None, label: str = "", **options: Unpack[VideoOptions]
    ) -> Request[PointResult]:
        """The points of what one label names."""
        return Request(image, label, **options)._as("point")

    @staticmethod
    def count(
        image: Images | None = None, label: str = "", **options: Unpack[VideoOptions]
    ) -> Request[CountResult]:
        """The number of what a label names."""
        return Request(image, label, **options)._as("count")

    @staticmethod
    def track(video: VideoLike, label: str, **options: Unpack[Options]) -> Request[TrackResult]:
        """The way through a video of what a label names."""
        options.setdefault("max_tokens", 2048)
        return Request(None, label, video=video, **options)._as("track")

    @staticmethod
    def choose(
        image: Images | None,
        text: str | Sequence[Mapping[str, Any]],
        choices: Sequence[str],
        **options: Unpack[ChoiceOptions],
    ) -> Request[Choice]:
        """The most likely of several answers."""
        request = Request(image, cast(str, text), **cast(VideoOptions, options))._as("choose")
        request.choices = choices
        if not isinstance(text, str):
            if image is not None or request.video is not None:
                raise PromptError(MEDIA_IN_MESSAGES)
            request.messages = text
        return request

    def _as(self, verb: str) -> Request[Any]:
        self.verb = verb
        return self

    def prompt(self, prompts: Mapping[str, str]) -> str:
        """Return the text that the model is asked. Raises PromptError.

        Args:
            prompts: the family's, see `PROMPTS`.
        """
        if self.verb == "caption":
            if not isinstance(self.text, str) or self.text not in CAPTION_PROMPTS:
                raise PromptError(f"length must be one of {', '.join(CAPTION_PROMPTS)}.")
            return CAPTION_PROMPTS[self.text]
        if self.verb in prompts:
            return prompts[self.verb].format(*read_labels([self.text]))
        return self.text

    def reader(self, turns: Sequence[Turn]) -> Callable[[Result], A_co]:
        """Return what makes the answer of a result; `turns` are the request's, with its media."""
        if self.verb not in PROMPTS:
            return lambda result: cast(A_co, result)
        [label], turn = read_labels([self.text]), turns[0]

        def read(result: Result) -> Any:
            found = parse_points(result.text).placed(turn.images, turn.video)
            truncated = found.truncated or result.finish_reason == "length"
            points = replace(found, truncated=truncated, label=label, result=result)
            if self.verb == "count":
                return CountResult.of(points)
            return TrackResult.of(points, turn.video) if self.verb == "track" else points

        return read


class CheckedOptions(Sampling):
    """Options of one request, checked.

    Attributes:
        max_crops: None for the engine's.
        timeout: seconds, None for no limit.
        answer_model: pydantic class that reads the answer, if one was given as `json_schema`.
        started: when the request began, on the monotonic clock.
    """

    max_crops: Annotated[int, Field(ge=1)] | None = None
    timeout: Annotated[float, Field(gt=0)] | None = None
    answer_model: type[BaseModel] | None = None
    started: float = Field(default_factory=time.monotonic)

    @property
    def deadline(self) -> float | None:
        """When `timeout` passes, on the monotonic clock."""
        return None if self.timeout is None else self.started + self.timeout

    def read(self, result: Result, stop: str | None) -> Result:
        """Return the result with `parsed` set if a JSON Schema was given.

        Args:
            stop: the stop string that ended the answer, None if none did.

        Raises:
            GenerationError: the answer is cut off, or the pydantic model refuses it.
        """
        try:
            return result if self.json_schema is None else self._parsed(result, stop)
        except GenerationError as exc:
            exc.result = result
            raise

    def _parsed(self, result: Result, stop: str | None) -> Result:
        text, truncated = result.text, result.finish_reason == "length"
        try:
            value = json.loads(text)
            # Any part of a number reads as a number.
            if type(value) in (int, float) and (truncated or (stop and stop[0] in "0123456789.eE")):
                raise GenerationError(_CUT, partial=text)
            if self.answer_model is not None:
                value = self.answer_model.model_validate_json(text)
        except ValidationError as exc:
            message = (
                f"The answer is JSON, but {exc.title} refuses it "
                f"({exc.error_count()} errors); the chained error says why."
            )
            raise GenerationError(message, partial=text) from exc
        except (ValueError, RecursionError) as exc:
            raise GenerationError(_CUT if truncated else _UNREADABLE, partial=text) from exc
        return replace(result, parsed=value)


_CUT = (
    "The answer was cut off before its JSON was complete; raise max_tokens, give no stop string "
    "that is part of it, or bound the schema's strings and lists (maxLength, maxItems, enum)."
)
_UNREADABLE = (
    "The answer cannot be read as JSON: a stop string ended it, or it is nested too deeply or has "
    "too long a number. The chained error says which."
)


def check_options(
    options: Mapping[str, Any], max_crops_limit: int | None, known: type = Options
) -> CheckedOptions:
    """Check the options of a request. Raises SamplingError for an unknown name or a wrong value.

    `max_crops_limit` is the engine's own `max_crops`, for which its memory was planned; None where
    there is none. `known` has the names.
    """
    for name in options:
        if name not in known.__annotations__:
            hint = did_you_mean(name, known.__annotations__)
            if name in Options.__annotations__:
                hint = " choose() generates nothing; it takes video, max_crops and timeout."
            if name in EdgeSettings.model_fields:
                hint = " It is a setting of EdgeVLM, for all requests."
            if name == "video":
                hint = " A conversation has its video in its messages; a caption is of an image."
            raise SamplingError(f"Unknown option {name}.{hint}")
    values = {name: plain(value) for name, value in options.items()}
    if values.get("json_schema") is not None:
        values["json_schema"], values["answer_model"] = _read_schema(values["json_schema"])
    try:
        checked = CheckedOptions(**values)
    except ValidationError as exc:
        problems = [f"{error['loc'][0]} {describe(error)}" for error in exc.errors()]
        raise SamplingError("; ".join(problems)) from None
    if checked.ignore_eos and checked.json_schema is not None:
        raise SamplingError("ignore_eos and json_schema exclude each other.")
    if max_crops_limit and checked.max_crops and checked.max_crops > max_crops_limit:
        raise SamplingError(f"max_crops must be at most {max_crops_limit}, the engine's own.")
    return checked


def _read_schema(given: object) -> tuple[dict[str, Any], type[BaseModel] | None]:
    """The schema as plain JSON, and the pydantic class it was taken from."""
    model: type[BaseModel] | None = None
    if inspect.isclass(given) and issubclass(given, BaseModel):
        model = given
        try:
            given = model.model_json_schema()
        except PydanticUserError as exc:
            raise SamplingError(
                f"The pydantic model {model.__name__} has no JSON Schema; the cause is chained."
            ) from exc
    if not isinstance(given, Mapping) or not given:
        raise SamplingError(
            "json_schema must be a JSON Schema as a non-empty mapping, or a pydantic model class."
        )
    try:
        # A copy: the caller may change theirs while the request waits.
        return json.loads(json.dumps(dict(given), allow_nan=False)), model
    except (TypeError, ValueError, RecursionError) as exc:
        raise SamplingError(
            "json_schema contains values that are not JSON, or is nested too deeply."
        ) from exc


def listed(value: Any) -> Any:
    """The (nested) list of an array, of one without dimensions its number; all else as it is."""
    return value.tolist() if isinstance(value, np.ndarray) else value


def check_token_ids(ids: Sequence[int]) -> list[int]:
    """Return the ids as a list. Raises PromptError for what is no token id."""
    ids = listed(ids)
    given = [plain(i) for i in ids] if isinstance(ids, Sequence) else [None]
    numbers = [i for i in given if type(i) is int and i >= 0]
    if len(numbers) != len(given):
        raise PromptError("An answer and its candidates are lists of token ids.")
    return numbers


def question(
    image: Images | None, text: str, video: VideoLike | None = None
) -> list[Mapping[str, Any]]:
    """A conversation of one user message, as `EdgeVLM.chat` takes it."""
    images = image if isinstance(image, list | tuple) else [] if image is None else [image]
    content: list[Mapping[str, Any]] = [{"type": "image", "image": one} for one in images]
    if video is not None:
        content.append({"type": "video", "video": video})
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def numbered(requests: Iterable[Request[A_co]]) -> Iterator[tuple[int, Request[A_co]]]:
    """Index and request of a batch. Raises PromptError for what is no iterable."""
    try:
        return enumerate(requests)
    except TypeError:
        raise PromptError("A batch is a list or another iterable of Request objects.") from None


def read_turns(
    messages: Sequence[Mapping[str, Any] | Turn],
    limits: ImageLimits,
    load_clip: Callable[[VideoLike], Clip],
) -> list[Turn]:
    """Check the structure of messages and load their images and videos.

    Raises PromptError, ImageError, and what `load_clip` raises.
    """
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise PromptError("messages must be a list of {'role': …, 'content': …}.")
    numbered = enumerate(messages, start=1)
    return [_read_turn(number, message, limits, load_clip) for number, message in numbered]


def _read_turn(
    number: int,
    message: Mapping[str, Any] | Turn,
    limits: ImageLimits,
    load_clip: Callable[[VideoLike], Clip],
) -> Turn:
    if isinstance(message, Turn):  # loaded before
        return message
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        raise PromptError(f"Message {number} must be a mapping with only 'role' and 'content'.")
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or role not in ("user", "assistant"):
        raise PromptError(
            f"Message {number}: role must be 'user' or 'assistant'. Molmo has no system messages: "
            "put such text in front of the question."
        )
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise PromptError(f"Message {number}: content must be a string or a list of parts.")
    texts, images, videos = [], [], []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        kind = kind if isinstance(kind, str) else None  # comparing an array gives an array
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "text":
            raise PromptError(f"Message {number}: the text must be a string.")
        elif kind == "image" and part.get("image") is not None:
            images.append(load(part["image"], limits))
        elif kind == "image_url":
            images.append(load(_data_url(number, part, kind), limits))
        elif kind == "video" and part.get("video") is not None:
            videos.append(load_clip(part["video"]))
        elif kind == "video_url":
            videos.append(load_clip(_data_url(number, part, kind)))
        else:
            raise PromptError(
                f"Message {number}: a part must be {{'type': 'text', 'text': …}}, "
                "{'type': 'image', 'image': …} or {'type': 'video', 'video': …}."
            )
    if (images or videos) and role == "assistant":
        raise PromptError(f"Message {number}: only user messages contain images and videos.")
    if len(videos) > 1:
        raise PromptError(ONE_VIDEO)
    return Turn(role, " ".join(texts), tuple(images), *videos)


def _data_url(number: int, part: Mapping[str, Any], kind: str) -> str:
    """The URL of an OpenAI ``image_url`` part, which must not name a file of this machine."""
    url = part.get(kind)
    url = url.get("url") if isinstance(url, Mapping) else url
    if not isinstance(url, str) or not url.lstrip()[:5].lower() == "data:":
        raise PromptError(
            f"Message {number}: {kind} must be a base64 data: URL; molmo_edge fetches nothing. "
            "Download the file and pass it as {'type': 'image', 'image': …} or 'video'."
        )
    return url


def read_labels(given: object) -> list[str]:
    """Labels as in training: lower-cased and stripped. Raises PromptError."""
    labels = [given] if isinstance(given, str) else given
    if not isinstance(labels, list | tuple) or not all(isinstance(one, str) for one in labels):
        raise PromptError("A label must be a string; only point() takes a list of strings too.")
    labels = [" ".join(one.lower().split()) for one in labels]
    # Format characters (Cf) join letters of Persian, Hindi and emoji; alone they are nothing.
    if not labels or any(set(map(unicodedata.category, one)) <= {"Cf", "Zs"} for one in labels):
        raise PromptError("A label is empty; say what to look for, such as 'the red mug'.")
    if any(c in "<>" or unicodedata.category(c) in ("Cc", "Cs") for c in "".join(labels)):
        raise PromptError(
            "A label contains '<', '>', control characters or lone surrogates; use plain words."
        )
    return labels


def check_choices(given: object) -> dict[str, str]:
    """Return the choices, as given → without space around them. Raises PromptError."""
    if not isinstance(given, list | tuple) or not all(isinstance(one, str) for one in given):
        raise PromptError("Give the choices as a list of strings.")
    if not 2 <= len(given) <= MAX_CHOICES:
        raise PromptError(f"Give 2 to {MAX_CHOICES} choices, not {len(given)}.")
    choices = {one: one.strip() for one in given}
    kinds = [set(map(unicodedata.category, one)) for one in choices.values()]
    # Format characters (Cf) join letters of Persian, Hindi and emoji; alone they are nothing.
    if any(kind <= {"Cf", "Zs"} for kind in kinds):
        raise PromptError("A choice is empty.")
    if any(kind & {"Cc", "Cs"} for kind in kinds):
        raise PromptError("A choice contains control characters or lone surrogates.")
    if len(set(choices.values())) < len(given):
        raise PromptError("Two choices are equal.")
    return choices


def token_tree(answers: Iterable[Sequence[int]]) -> dict[tuple[int, ...], list[int]]:
    """Return each beginning of the answers → the tokens that follow it; the empty one first."""
    tree: dict[tuple[int, ...], list[int]] = {}
    for ids in answers:
        for i, token in enumerate(ids):
            tree.setdefault(tuple(ids[:i]), []).append(token)
    return tree


def refuse_special(ids: Sequence[int], special: Mapping[int, str]) -> None:
    """Raise PromptError when tokens of user text are among `special`: id → spelling."""
    if names := sorted({special[i] for i in ids if i in special}):
        raise PromptError(
            f"The text contains {', '.join(names[:3])}: special tokens of the model, which no user "
            "text may contain. Remove or respell them."
        )


def check_length(tokens: int, max_model_len: int, images: int = 0) -> None:
    """Raise PromptTooLongError when a prompt of `tokens` leaves no room to answer."""
    if tokens >= max_model_len:
        included = f", {images} image(s) included," if images else ""
        raise PromptTooLongError(
            f"The prompt has at least {tokens} tokens{included} and leaves no room to answer: "
            f"max_model_len is {max_model_len}. Shorten the text, use fewer images or a lower "
            "max_crops or max_frames, or raise max_model_len."
        )


def check_turns(turns: Sequence[Turn]) -> None:
    """Raise PromptError unless turns alternate, start and end with the user, who says something.

    A conversation has images or one video.
    """
    if not turns:
        raise PromptError("The conversation is empty; give at least one user turn.")
    for i, turn in enumerate(turns):
        if turn.role != ("assistant" if i % 2 else "user"):
            raise PromptError("Roles must alternate, starting with the user.")
        # A model may have answered nothing.
        if turn.role == "user" and not turn.text.strip():
            raise PromptError("The text is empty.")
        try:
            turn.text.encode()
        except UnicodeEncodeError:
            raise PromptError("The text contains lone surrogates: no valid Unicode.") from None
    if len(turns) % 2 == 0:
        raise PromptError("The last turn must be the user's.")
    videos = sum(turn.video is not None for turn in turns)
    if videos > 1 or (videos and any(turn.images for turn in turns)):
        raise PromptError(ONE_VIDEO)
