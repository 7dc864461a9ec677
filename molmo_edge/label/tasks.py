"""What is asked about every image, and the typed column that the answers fill."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from molmo_edge.errors import ConfigError, InputError, did_you_mean
from molmo_edge.images import printable
from molmo_edge.label.sources import pyarrow
from molmo_edge.points import CountResult, PointResult
from molmo_edge.requests import Request, check_choices, check_options, read_labels
from molmo_edge.results import Choice, Result
from molmo_edge.settings import describe

# Columns of every output, which no task may have; the first is the row's name.
FIXED = ("row", "hash", "width", "height", "finish_reason", "tokens", "seconds", "error")
VERBS = ("caption", "point", "count", "ask", "choose")


class Task(BaseModel):
    """One question about every image.

    Exactly one of `caption`, `point`, `count`, `ask` and `choose` is given.

    Attributes:
        name: of the column; by default made of the rest, such as ``count_chairs``.
        caption: length of a description: a column of text.
        point: label: a column of lists of {x, y (from 0 to 1), column, row (pixels)}; null where
            the answer neither points nor says that there is nothing.
        count: label: a column of integers.
        ask: question: a column of text; with `json_schema`, of JSON.
        choose: question with `choices`: a column of {choice, probabilities, outside}.
        choices: answers to choose from, see `EdgeVLM.choose`.
        json_schema: JSON Schema that the answer must follow.
        max_tokens: of the answer.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = ""
    caption: Literal["short", "normal", "long"] | None = None
    point: str | None = None
    count: str | None = None
    ask: str | None = None
    choose: str | None = None
    choices: tuple[str, ...] = ()
    json_schema: dict[str, Any] | None = None
    max_tokens: int | None = Field(default=None, ge=1)

    @property
    def verb(self) -> str:
        return next(verb for verb in VERBS if getattr(self, verb) is not None)

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        if isinstance(given, dict) and not given.get("name"):
            if "caption" in given:
                return {**given, "name": "caption"}
            verb = next((one for one in VERBS if isinstance(given.get(one), str)), "")
            words = re.sub(r"\W+", "_", given.get(verb, "")).strip("_").lower()
            return {**given, "name": f"{verb}_{words}"[:60].strip("_")}
        return given

    @model_validator(mode="after")
    def _checked(self) -> Task:
        given = [verb for verb in VERBS if getattr(self, verb) is not None]
        if len(given) != 1:
            raise ValueError(f"a task has exactly one of {', '.join(VERBS)}")
        if bool(self.choices) != (given == ["choose"]):
            raise ValueError("choices belong to choose, which needs them")
        if self.json_schema is not None and given != ["ask"]:
            raise ValueError("json_schema belongs to ask")
        if self.choices and self.max_tokens:
            raise ValueError("choose generates nothing, so it has no max_tokens")
        return self

    def check(self, options: Mapping[str, Any], max_crops: int | None = None) -> None:
        """Raise ConfigError, before an engine starts, for what it would refuse in every row."""
        try:
            check_options(self._options(options), max_crops)
            if self.choices:
                check_choices(self.choices)
            if self.verb in ("point", "count"):
                read_labels([getattr(self, self.verb)])
            elif not getattr(self, self.verb).strip():
                raise ConfigError(f"Task {self.name}: the question is empty.")
        except InputError as exc:
            raise ConfigError(f"Task {self.name}: {exc}") from exc

    def _options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        own = {"max_tokens": self.max_tokens, "json_schema": self.json_schema}
        return {**options, **{name: one for name, one in own.items() if one is not None}}

    def request(self, image: Any, options: Mapping[str, Any]) -> Request[Any]:
        """What asks this about an image; `options` are those of all tasks."""
        if self.choose is not None:
            kept = {name: v for name, v in options.items() if name in ("timeout", "max_crops")}
            return Request.choose(image, self.choose, self.choices, **kept)
        options = self._options(options)
        if self.caption is not None:
            return Request.caption(image, self.caption, **options)
        if self.point is not None:
            return Request.point(image, self.point, **options)
        if self.count is not None:
            return Request.count(image, self.count, **options)
        return Request(image, self.ask or "", **options)

    def type(self) -> Any:
        """The column's pyarrow type."""
        pa = pyarrow()
        if self.point is not None:
            place = {"x": pa.float64(), "y": pa.float64(), "column": pa.int32(), "row": pa.int32()}
            return pa.list_(pa.struct(place))
        if self.count is not None:
            return pa.int64()
        if self.choose is not None:
            each = pa.struct({choice: pa.float64() for choice in self.choices})
            return pa.struct(
                {"choice": pa.string(), "probabilities": each, "outside": pa.float64()}
            )
        return pa.string()

    def value(self, answer: Any, size: tuple[int, int]) -> Any:
        """The column's value; `size` is the image's (width, height)."""
        if isinstance(answer, PointResult):
            if not answer.points and not answer.none_found:
                return None  # neither points nor says that there are none
            keys = ("x", "y", "column", "row")
            return [dict(zip(keys, (p.x, p.y, *p.px(size)), strict=True)) for p in answer.points]
        if isinstance(answer, CountResult):
            return answer.number
        if isinstance(answer, Choice):
            return {
                "choice": answer.choice,
                "probabilities": dict(answer.probabilities),
                "outside": answer.outside,
            }
        assert isinstance(answer, Result)
        if self.json_schema is not None:
            return json.dumps(answer.parsed, ensure_ascii=False)
        return answer.text


def read_tasks(given: Sequence[Task | Mapping[str, Any]]) -> tuple[Task, ...]:
    """Return the tasks. Raises ConfigError for what is none, and for names that are not unique."""
    tasks = []
    for number, one in enumerate(given, 1):
        if isinstance(one, Task):
            tasks.append(one)
            continue
        if not isinstance(one, Mapping):
            raise ConfigError(f"Task {number}: it is no table of settings.")
        for key in one:
            if key not in Task.model_fields:
                hint = did_you_mean(str(key), Task.model_fields)
                raise ConfigError(f"Task {number}: {key} is unknown.{hint}")
        try:
            tasks.append(Task(**one))
        except ValidationError as exc:
            problems = [
                f"{'.'.join(map(str, error['loc']))} {describe(error)}".strip()
                for error in exc.errors()
            ]
            raise ConfigError(f"Task {number}: {'; '.join(problems)}.") from None
    names = [task.name for task in tasks]
    if not names:
        raise ConfigError("There is nothing to ask: give at least one task.")
    for name in names:
        if not name.isprintable():
            raise ConfigError(f"The name of a task has characters that are no text: {name!r}.")
        if names.count(name) > 1 or name in FIXED:
            raise ConfigError(f"Two columns would have the name {name}; give the task another.")
    return tuple(tasks)


def load_tasks(path: Path) -> list[Mapping[str, Any]]:
    """Read ``[[task]]`` tables from a TOML file; `json_schema` may be a file beside it.

    Raises ConfigError.
    """
    try:
        document = tomllib.loads(_read_text(path))
    except (OSError, ValueError, RecursionError) as exc:
        raise ConfigError(f"{printable(path)} is no TOML file that can be read: {exc}") from exc
    tasks = document.pop("task", None)
    if document or not isinstance(tasks, list) or not all(isinstance(t, dict) for t in tasks):
        raise ConfigError(f"{printable(path)}: tasks are tables named [[task]], and nothing else.")
    for task in tasks:
        if isinstance(schema := task.get("json_schema"), str):
            task["json_schema"] = load_schema(path.parent / schema)
    return tasks


def load_schema(path: Path) -> dict[str, Any]:
    """Read a JSON Schema file. Raises ConfigError."""
    try:
        schema = json.loads(_read_text(path))
    except (OSError, ValueError, RecursionError) as exc:
        raise ConfigError(f"{printable(path)} is no JSON file that can be read.") from exc
    if not isinstance(schema, dict):
        raise ConfigError(f"{printable(path)} is not a JSON Schema, which is an object.")
    return schema


def _read_text(path: Path) -> str:
    """Read a regular file: a pipe would wait."""
    if not path.is_file():
        raise OSError("no such file")
    return path.read_text(encoding="utf-8")
