"""Engine settings: names, types and ranges, and the sources they are read from.

``resolve()`` states the order of sources. Every name and value is checked in every source, also
where a higher source hides it: a misspelt name that is silently ignored is worse than an error.
"""

from __future__ import annotations

import codecs
import functools
import io
import logging
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
from dotenv import dotenv_values
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)
from pydantic_core import ErrorDetails, from_json, to_jsonable_python
from pydantic_settings import BaseSettings, EnvSettingsSource

from molmo_edge.errors import ConfigError, nearest
from molmo_edge.files import expand_home
from molmo_edge.sampling import Sampling

logger = logging.getLogger("molmo_edge")

PREFIX = "MOLMO_EDGE_"

PrecisionName = Literal["auto", "bf16", "fp8", "w4a16", "nvfp4"]
KVCacheDtype = Literal[
    "auto", "fp8", "fp8_e4m3", "fp8_e5m2", "fp8_per_token_head", "int8_per_token_head", "bfloat16"
]  # fmt: skip
PRECISIONS: tuple[str, ...] = get_args(PrecisionName)

# vLLM's names of what a setting with another name decides.
_SETTING_OF = {"quantization": "precision", "kv_cache_memory_bytes": "kv_cache_memory_gb"}
_REQUEST_OPTIONS = frozenset(
    {*Sampling.model_fields, "timeout"} - {"reuse_prefix", "logprob_token_ids"}
)
# What Kubernetes and Compose set for a service whose name begins with molmo-edge.
_SERVICE = re.compile(r"(.+_)?(service_host|service_port(_.+)?|port(_\d+_[a-z]+(_.+)?)?)")


def _parse_json(value: object) -> object:
    try:
        return from_json(value, allow_inf_nan=False) if isinstance(value, str) else value
    except ValueError as exc:
        raise ValueError(f"should be a JSON object: {exc}") from None


def _not_a_setting(engine_args: dict[str, Any]) -> dict[str, Any]:
    for key in engine_args:
        if (setting := _SETTING_OF.get(key, key)) in EdgeSettings.model_fields:
            raise ValueError(f"must not contain {key}: set {setting} itself")
    return engine_args


Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Directory = Annotated[Path, Field(strict=False), AfterValidator(expand_home)]
EngineArgs = Annotated[dict[str, Any], BeforeValidator(_parse_json), AfterValidator(_not_a_setting)]


class EdgeSettings(BaseModel):
    """Settings of one engine, checked and frozen.

    Booleans are not numbers, and NaN and infinity are refused. ``resolve()`` reads the environment
    and the files; the constructor reads neither.

    Attributes:
        model: directory or hub name of a checkpoint, or a built-in one: ``demo`` knows drawn
            shapes; ``stub`` (of Molmo 1) and ``stub-2`` have the real tower and random weights.
        profile: name of a device profile; ``auto`` detects the device.
        precision: of the language model's dense weights; ``auto`` follows the profile.
        dtype: of activations and unquantised weights; ``auto`` is bfloat16, whatever the checkpoint
            states, or float32 on a processor without bfloat16 instructions where the weights, in
            float32, take at most half of the memory.
        kv_cache_dtype: of the KV cache, by vLLM's name.
        max_model_len: tokens of prompt (image included) and answer together, at least 64; a
            profile's is lowered to the checkpoint's own and to what fits the memory.
        max_num_seqs: requests decoded together, 1 to 1024.
        max_crops: high-resolution crops of an image beside the global view, 1 to 32; by default
            the checkpoint's own.
        max_frames: frames of a video that the model sees, 1 to 1024; by default the checkpoint's
            own.
        resize: ``torch`` (float32, the reference's pixels to rounding) or ``tensorflow`` (the
            reference's own, extra ``tf``).
        load_format: vLLM's name of the checkpoint's format; ``dummy`` gives random weights.
        seed: of the engine, 0 to 2**32 - 1.
        gpu_memory_utilization: fraction of the device's memory vLLM may take, above 0, at most 1.
        kv_cache_memory_gb: size of the KV cache in GiB (2**30 bytes, as vLLM counts GB).
        attention_backend: vLLM's backend for the language model.
        mm_encoder_attn_backend: vLLM's backend for the vision tower.
        enforce_eager: run without torch.compile and CUDA graphs.
        enable_prefix_caching: reuse the KV cache of equal prompt beginnings; `choose` and `score`
            do in any case.
        speculation: ``ngram`` drafts tokens from the prompt, ``format`` those that the form of a
            pointing answer dictates or, with ``engine="thread"``, a JSON Schema; greedy answers
            stay the same.
        engine: ``thread`` runs in this process; ``process`` in a child process, for applications
            whose own Python code is busy (the main script must be importable).
        max_queue: requests in flight, running or waiting, before new ones are refused.
        stall_s: seconds without a token for any request that are reported as a stall.
        cache_dir: root of every cache on disk; ``~`` is the home directory.
        max_image_bytes: largest encoded image, in bytes.
        max_image_pixels: largest decoded image or frame of a video, in pixels.
        max_video_bytes: largest encoded video, in bytes.
        max_video_s: longest video, in seconds.
        engine_args: further arguments of ``vllm.LLM``, passed on unchanged; those that a setting
            decides are refused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    model: Text = "demo"
    profile: Text = "auto"
    precision: PrecisionName = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    kv_cache_dtype: KVCacheDtype = "fp8"
    max_model_len: Annotated[int, Field(ge=64)] | None = None
    max_num_seqs: Annotated[int, Field(ge=1, le=1024)] = 8
    max_crops: Annotated[int, Field(ge=1, le=32)] | None = None
    max_frames: Annotated[int, Field(ge=1, le=1024)] | None = None
    resize: Literal["torch", "tensorflow"] = "torch"
    load_format: Text = "auto"
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0  # NumPy's range, which vLLM seeds too
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    kv_cache_memory_gb: Annotated[float, Field(gt=0)] | None = None
    attention_backend: Text | None = None
    mm_encoder_attn_backend: Text | None = None
    enforce_eager: bool | None = None
    enable_prefix_caching: bool = False
    speculation: Literal["off", "ngram", "format"] = "off"
    engine: Literal["thread", "process"] = "thread"
    max_queue: Annotated[int, Field(ge=1)] = 256
    stall_s: Annotated[float, Field(gt=0)] = 120.0
    cache_dir: Directory | None = None
    max_image_bytes: Annotated[int, Field(ge=1)] = 64 * 2**20
    max_image_pixels: Annotated[int, Field(ge=1)] = 64_000_000
    max_video_bytes: Annotated[int, Field(ge=1)] = 4 * 2**30
    max_video_s: Annotated[float, Field(gt=0)] = 4 * 3600.0
    engine_args: EngineArgs = Field(default_factory=dict)


class _Variables(EdgeSettings, BaseSettings):  # type: ignore[misc]
    """What pydantic-settings' source is told to read; never built."""


class Origin(StrEnum):
    """Where a value comes from, highest first."""

    ARGUMENT = "argument"
    ENVIRONMENT = "environment"
    DOTENV = ".env"
    CONFIG = "config"
    PROFILE = "profile"
    DEFAULT = "default"


@dataclass(frozen=True)
class Resolved:
    """Settings and where each value comes from.

    Attributes:
        settings: the values.
        origins: by setting. Keys of ``engine_args`` are listed as "engine_args.KEY";
            "engine_args" itself only while it is empty.
        profile_name: the profile that was applied, which is what ``settings.profile`` ``"auto"``
            became; ``None`` if none was.
    """

    settings: EdgeSettings
    origins: Mapping[str, Origin]
    profile_name: str | None = None

    @property
    def by_user(self) -> set[str]:
        """Names that the user set, as opposed to the profile and the defaults."""
        below = (Origin.PROFILE, Origin.DEFAULT)
        return {name for name, origin in self.origins.items() if origin not in below}

    def rows(self) -> Iterator[tuple[str, Any, Origin]]:
        """Name, JSON value and origin of each setting and of each key of ``engine_args``."""
        for name, origin in self.origins.items():
            setting, _, key = name.partition(".")
            value = getattr(self.settings, setting)
            plain = to_jsonable_python(
                value[key] if key else value, fallback=lambda other: f"<{type(other).__name__}>"
            )
            yield name, plain, origin


def resolve(
    arguments: Mapping[str, Any],
    *,
    config: Path | str | None = None,
    profile_settings: Callable[[str], tuple[str, Mapping[str, Any]]] | None = None,
) -> Resolved:
    """Read and check all sources, and merge them: ``engine_args`` key by key, the rest by setting.

    Args:
        arguments: settings by name; ``None`` counts as not given, as do ``none`` and an empty
            string in the environment and in ``.env``.
        config: a TOML file; ``MOLMO_EDGE_CONFIG`` if ``None``.
        profile_settings: maps the requested profile (``auto`` included) to the name and the
            settings of the profile to apply. Called once.

    Raises:
        ConfigError: with one line for each problem, naming its source.
    """
    environment = _variables(EnvSettingsSource(_Variables).env_vars)
    dotenv = _variables(_read_dotenv())
    named = [environment.pop("config", None), dotenv.pop("config", None)]
    if config is None:
        config = named[0] or named[1]
    # The order of sources, highest first; the profile that they name follows, then the defaults.
    sources = [
        (Origin.ARGUMENT, _check("argument", arguments)),
        (Origin.ENVIRONMENT, _check("environment", environment, PREFIX)),
        (Origin.DOTENV, _check(".env", dotenv, PREFIX)),
    ]
    if config is not None:
        label = f"config {Path(config).name}"
        sources.append((Origin.CONFIG, _check(label, _read_toml(config))))
    profile_name = None
    if profile_settings is not None:
        requested = next((v["profile"] for _, v in sources if "profile" in v), "auto")
        profile_name, values = profile_settings(requested)
        sources.append((Origin.PROFILE, _check(f"profile {profile_name}", values)))
    return _merge(sources, profile_name)


def _variables(variables: Mapping[str, str | None]) -> dict[str, str]:
    """Our variables by setting, of names in lower case, without those that count as not given."""
    prefix = PREFIX.lower()
    given = {
        name.removeprefix(prefix): _unquote((value or "").strip())
        for name, value in variables.items()
        if name.startswith(prefix)
    }
    return {
        name: value
        for name, value in given.items()
        if value and value.lower() != "none" and not _SERVICE.fullmatch(name)
    }


def _unquote(value: str) -> str:
    """Without one pair of quotes, which ``docker --env-file`` keeps."""
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
    return value[1:-1] if quoted else value


def _read_dotenv() -> dict[str, str | None]:
    path = Path(".env")
    try:
        text = _decode(path.read_bytes()) if path.is_file() else ""
    except OSError as exc:
        raise ConfigError(f".env cannot be read: {exc}") from exc
    read = dotenv_values(stream=io.StringIO(text))
    return {name.lower(): value for name, value in read.items()}


@functools.cache  # one warning for one file
def _decode(data: bytes) -> str:
    """Text of a ``.env`` file, which another program may have written, or several."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    else:
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError:
            encoding = "latin-1"
    logger.warning(".env is not UTF-8 and is read as %s.", encoding)
    return data.decode(encoding, "replace")


def _read_toml(config: Path | str) -> dict[str, Any]:
    try:
        return tomllib.loads(expand_home(config).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as exc:
        raise ConfigError(f"config file '{config}' cannot be read: {exc}") from exc


def _check(label: str, values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Validate the names and values of one source; variables, which have a prefix, as strings."""
    given = {name: plain(value) for name, value in values.items() if value is not None}
    validate = EdgeSettings.model_validate_strings if prefix else EdgeSettings.model_validate
    try:
        settings = validate(given)
    except ValidationError as exc:
        problems = [f"{label}: {_explain(error, prefix)}" for error in exc.errors()]
        raise ConfigError("\n".join(problems)) from None
    return {name: getattr(settings, name) for name in settings.model_fields_set}


def _merge(sources: list[tuple[Origin, dict[str, Any]]], profile_name: str | None) -> Resolved:
    values: dict[str, Any] = {"engine_args": {}}
    origins = dict.fromkeys(EdgeSettings.model_fields, Origin.DEFAULT)
    for origin, given in reversed(sources):
        keys = given.pop("engine_args", {})
        values |= given
        values["engine_args"] |= keys
        origins |= dict.fromkeys([*given, *(f"engine_args.{key}" for key in keys)], origin)
    if values["engine_args"]:
        del origins["engine_args"]
    return Resolved(EdgeSettings.model_construct(**values), origins, profile_name)


def _explain(error: ErrorDetails, prefix: str) -> str:
    """Describe an error of pydantic's; variables are named in capitals, after their prefix."""

    def spelled(name: str) -> str:
        return prefix + name.upper() if prefix else name

    name = str(error["loc"][0])[:60]
    if error["type"] == "extra_forbidden":
        return f"{spelled(name)} {_unknown(name, spelled)}"
    return f"{spelled(name)} {describe(error)}"


def _unknown(name: str, spelled: Callable[[str], str]) -> str:
    if name in _SETTING_OF:
        return f"is vLLM's name; set {spelled(_SETTING_OF[name])}."
    if name in _REQUEST_OPTIONS:
        return "is an option of a request, as in query(image, text, max_tokens=60)."
    near = nearest(name.lower(), EdgeSettings.model_fields)
    hint = f" Did you mean {spelled(near)}?" if near else ""
    return f"is unknown.{hint} vLLM's own arguments belong in {spelled('engine_args')}."


def plain(value: Any) -> Any:
    """The Python value of a NumPy scalar; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def describe(error: ErrorDetails) -> str:
    """Say what is wrong with a value, by pydantic's error about it."""
    value = error["input"]
    problem = re.sub("^(Value error,|Input|String) ", "", error["msg"])
    # Python does not print integers of thousands of digits.
    simple = isinstance(value, str | float) or (isinstance(value, int) and abs(value) < 10**60)
    given = f"{value!r:.60}" if simple else f"a value of type {type(value).__name__}"
    return f"{problem.strip()}; got {given}"
