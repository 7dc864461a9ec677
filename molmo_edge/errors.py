"""All errors that molmo_edge raises, in one tree.

::

    MolmoEdgeError
    ├── ConfigError (ValueError)         a setting, profile or engine argument is unknown or wrong
    ├── ModelError                       the model directory is missing, broken or not supported
    ├── MissingDependencyError (ImportError)   a package is needed; the message names the extra
    ├── InputError (ValueError)          one request was refused before it reached the engine
    │   ├── ImageError                   the image cannot be used; the cause is chained
    │   ├── VideoError                   the video cannot be used; the cause is chained
    │   ├── PromptError                  the text cannot be used
    │   │   └── PromptTooLongError       prompt (and image) tokens do not fit the context
    │   └── SamplingError                a sampling option is out of range
    ├── RequestError                     one request ended early; `.partial` keeps its text
    │   ├── RequestTimeout (TimeoutError)    its deadline passed
    │   ├── RequestCancelled             it was cancelled
    │   └── GenerationError              it was rejected or lost, or its JSON is cut off
    ├── EngineError                      the engine as a whole cannot answer
    │   ├── EngineStartError             it could not be built; the cause is chained
    │   ├── EngineDeadError              a step failed; the cause is chained
    │   ├── EngineClosedError            `close()` was called
    │   ├── EngineForkedError            a forked child used its parent's engine
    │   └── QueueFull                    the bounded queue has no room for another request
    ├── CameraError                      an image source stalled or ended unexpectedly
    ├── QuantizeError                    a checkpoint cannot be quantised
    └── BenchmarkError                   a benchmark or one of its result files cannot be used

Messages say what was wrong, what was expected and what to do. They contain no object reprs,
memory addresses or prompt text.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that a misspelt one probably means; None if none is close."""
    return next(iter(difflib.get_close_matches(name[:120], known, n=1, cutoff=0.75)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence with the nearest known name, after a space; empty if none is close."""
    near = nearest(name, known)
    return f" Did you mean {near}?" if near else ""


class MolmoEdgeError(Exception):
    """Base class of every error raised on purpose by molmo_edge."""


class ConfigError(MolmoEdgeError, ValueError):
    """A setting, profile or engine argument is unknown, contradictory or out of range."""


class ModelError(MolmoEdgeError):
    """A model directory is missing, broken, or has a layout that is not supported."""


class MissingDependencyError(MolmoEdgeError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""


class InputError(MolmoEdgeError, ValueError):
    """One request was refused before it reached the engine. The next one works."""


class ImageError(InputError):
    """An image cannot be read or is outside the limits. The cause, if any, is chained."""


class VideoError(InputError):
    """A video cannot be read or is outside the limits. The cause, if any, is chained."""


class PromptError(InputError):
    """A prompt is empty, not a string, or contains special tokens of the model."""


class PromptTooLongError(PromptError):
    """Prompt and image tokens leave no room to generate within ``max_model_len``."""


class SamplingError(InputError):
    """A sampling option is not a number, out of range, or contradicts another."""


class RequestError(MolmoEdgeError):
    """One request ended without a complete result.

    Attributes:
        partial: the text generated until then, ``""`` if none.
    """

    def __init__(self, message: str, *, partial: str = "") -> None:
        super().__init__(message)
        self.partial = partial


class RequestTimeout(RequestError, TimeoutError):
    """The deadline of a request passed while it was queued, prefilled or decoded."""


class RequestCancelled(RequestError):
    """A request was cancelled by its owner or by ``close()``."""


class GenerationError(RequestError):
    """The engine rejected or lost this one request, or its JSON cannot be read; others continue.

    Attributes:
        result: the whole `Result` if only its JSON is at fault, else None.
    """

    result: Any = None


class EngineError(MolmoEdgeError):
    """The engine as a whole cannot answer."""


class EngineStartError(EngineError):
    """The engine could not be built. The cause is chained."""


class EngineDeadError(EngineError):
    """A step of the engine failed; it answers nothing more until ``restart()``."""


class EngineClosedError(EngineError):
    """The engine was closed."""


class EngineForkedError(EngineError):
    """A forked child process used an engine that belongs to its parent."""


class QueueFull(EngineError):
    """The bounded request queue has no room."""


class CameraError(MolmoEdgeError):
    """An image source stalled, disappeared or never delivered a frame."""


class QuantizeError(MolmoEdgeError):
    """A checkpoint cannot be quantised."""


class BenchmarkError(MolmoEdgeError):
    """A benchmark, or one of its result files, cannot be used."""
