"""Engine settings: names, types and ranges, and the sources they are read from.

``resolve()`` states the order of sources. Every name and value is checked in every source, also
where a higher source hides it: a misspelt name that is silently ignored is worse than an error.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import numbers
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import ErrorDetails, to_jsonable_python
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from molmo_edge.errors import ConfigError

PREFIX = "MOLMO_EDGE_"
CONFIG_VARIABLE = PREFIX + "CONFIG"  # the one variable that is not a setting: the TOML file

PrecisionName = Literal["auto", "bf16", "fp8", "w4a16", "nvfp4"]
KVCacheDtype = Literal[
    "auto",
    "fp8",
    "fp8_e4m3",
    "fp8_e5m2",
    "fp8_per_token_head",
    "int8_per_token_head",
    "bfloat16",
]
PRECISIONS: tuple[str, ...] = get_args(PrecisionName)

_MOE_ONLY = (
    "vLLM applies it to mixture-of-experts layers only and would silently leave every dense layer "
    "in BF16"
)
# https://docs.vllm.ai/en/latest/features/quantization/int8/ ("Blackwell GPU Limitation")
_NO_INT8 = "vLLM has no 8-bit integer matrix product on Blackwell GPUs (sm_100 and up); use fp8"
_NO_BNB = "vLLM 0.32 no longer loads bitsandbytes; use fp8, or a checkpoint quantised to w4a16"
REFUSED_PRECISIONS = {
    "bitsandbytes": _NO_BNB,
    "bnb": _NO_BNB,
    "nvfp4_per_token": f"{_MOE_ONLY}; use a checkpoint quantised to nvfp4, or fp8",
    "int8_per_channel_weight_only": f"{_MOE_ONLY}; use fp8, or a checkpoint quantised to w4a16",
    "int8": _NO_INT8,
    "w8a8": _NO_INT8,
}
# vLLM's names of what a setting with another name decides.
_SETTING_OF = {"quantization": "precision", "kv_cache_memory_bytes": "kv_cache_memory_gb"}
_MAX_CONFIG_BYTES = 1 << 20  # a larger file is a checkpoint named by mistake
_MAX_DEPTH = 32
_EXPECTED = {
    "int": "an integer",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "a string",
    "path": "the path of a directory",
    "dict": "a table of names and values",
}
_LIMIT = {"greater_than": "above", "greater_than_equal": "at least", "less_than_equal": "at most"}


def _visible(value: str) -> str:
    if not value.strip() or not value.isprintable():
        raise ValueError(f"must be one line of visible text, not {_show(value)}")
    return value


def _directory(value: Path) -> Path:
    try:
        path = value.expanduser()
    except RuntimeError:
        raise ValueError(f"{_show(str(value))} begins with an unknown home directory") from None
    if path == Path() or not str(path).isprintable():
        raise ValueError(f"must be the path of a directory, not {_show(str(path))}")
    return path


def _not_refused(value: object) -> object:
    if isinstance(value, str):
        reason = REFUSED_PRECISIONS.get(value.strip().lower().replace("-", "_"))
        if reason is not None:
            names = ", ".join(PRECISIONS)
            raise ValueError(f"{_show(value)} is refused: {reason}. Valid values: {names}")
    return value


def _engine_args(value: object) -> object:
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or not key.strip():
                raise ValueError(f"has the key {_show(key)}, where a name is expected")
            if (setting := _SETTING_OF.get(key, key)) in EdgeSettings.model_fields:
                raise ValueError(f"must not contain {key}: set {setting} itself")
    return _copy(value)


def _copy(value: Any, at: str = "", depth: int = 0) -> Any:
    """Copy dicts and lists, so that frozen settings stay frozen; refuse NaN and infinity."""
    if depth > _MAX_DEPTH:
        raise ValueError("is nested too deeply")
    if isinstance(value, Mapping):
        return {key: _copy(item, f"{at}.{key}", depth + 1) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copy(item, at, depth + 1) for item in value)
    real = isinstance(value, numbers.Real) and not isinstance(value, numbers.Rational)
    if real and not math.isfinite(value):
        raise ValueError(f"contains NaN or infinity at {at[1:]}")
    return value


Text = Annotated[str, AfterValidator(_visible)]
Directory = Annotated[Path, Field(strict=False), AfterValidator(_directory)]
Precision = Annotated[PrecisionName, BeforeValidator(_not_refused)]
EngineArgs = Annotated[dict[str, Any], BeforeValidator(_engine_args)]


class EdgeSettings(BaseSettings):
    """Settings of one engine, checked and frozen.

    Booleans are not numbers, and NaN and infinity are refused. The constructor reads neither the
    environment nor a file; ``resolve()`` does.

    Attributes:
        model: directory or hub name of a checkpoint; ``stub`` is the small built-in one.
        profile: name of a device profile; ``auto`` detects the device.
        precision: of the language model's dense weights; ``auto`` follows the profile.
        dtype: of activations and unquantised weights; ``auto`` is bfloat16, or float32 on a
            processor without bfloat16 instructions.
        kv_cache_dtype: of the KV cache, by vLLM's name.
        max_model_len: tokens of prompt (image included) and answer together, at least 64.
        max_num_seqs: requests decoded together, 1 to 1024.
        max_crops: high-resolution crops of an image beside the global view, 1 to 32.
        resize: ``torch`` (float32, within 4.4e-4 of the reference) or ``tensorflow`` (the
            reference's own, extra ``tf``).
        load_format: vLLM's name of the checkpoint's format; ``dummy`` gives random weights.
        seed: of the engine, 0 to 2**32 - 1.
        gpu_memory_utilization: fraction of the device's memory vLLM may take, above 0, at most 1.
        kv_cache_memory_gb: size of the KV cache in GiB (2**30 bytes, as vLLM counts GB).
        attention_backend: vLLM's backend for the language model.
        mm_encoder_attn_backend: vLLM's backend for the vision tower.
        enforce_eager: run without torch.compile and CUDA graphs.
        enable_prefix_caching: reuse the KV cache of equal prompt beginnings.
        mm_processor_cache_gb: cache of preprocessed images in GiB, 0 for none.
        speculation: ``ngram`` drafts tokens from the prompt.
        engine: ``thread`` runs in this process; ``process`` in a child process, for applications
            whose own Python code is busy (the main script must be importable).
        max_queue: requests that may wait before new ones are refused.
        stall_s: seconds after which a single engine step is reported as a stall.
        cache_dir: root of every cache on disk; ``~`` is the home directory.
        max_image_bytes: largest encoded image, in bytes.
        max_image_pixels: largest decoded image, in pixels.
        engine_args: further arguments of ``vllm.LLM``, passed on unchanged; those that a setting
            decides are refused.

    Raises:
        ConfigError: a name is unknown or a value is wrong.
    """

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, case_sensitive=True
    )

    model: Text = "stub"
    profile: Text = "auto"
    precision: Precision = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    kv_cache_dtype: KVCacheDtype = "fp8"
    max_model_len: Annotated[int, Field(ge=64)] | None = None
    max_num_seqs: Annotated[int, Field(ge=1, le=1024)] = 8
    max_crops: Annotated[int, Field(ge=1, le=32)] = 12
    resize: Literal["torch", "tensorflow"] = "torch"
    load_format: Text = "auto"
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0  # NumPy's range, which vLLM seeds too
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    kv_cache_memory_gb: Annotated[float, Field(gt=0)] | None = None
    attention_backend: Text | None = None
    mm_encoder_attn_backend: Text | None = None
    enforce_eager: bool | None = None
    enable_prefix_caching: bool = False
    mm_processor_cache_gb: Annotated[float, Field(ge=0)] = 0.0
    speculation: Literal["off", "ngram"] = "off"
    engine: Literal["thread", "process"] = "thread"
    max_queue: Annotated[int, Field(ge=1)] = 256
    stall_s: Annotated[float, Field(gt=0)] = 120.0
    cache_dir: Directory | None = None
    max_image_bytes: Annotated[int, Field(ge=1)] = 64 * 2**20
    max_image_pixels: Annotated[int, Field(ge=1)] = 64_000_000
    engine_args: EngineArgs = Field(default_factory=dict)

    def __init__(self, **values: Any) -> None:
        given, problems = _Source(Origin.ARGUMENT, values).by_setting()
        if not problems:
            try:
                super().__init__(**given)
            except ValidationError as exc:
                problems = [f"argument: {e['loc'][0]} {_explain(e)}" for e in exc.errors()]
        if problems:
            raise ConfigError("\n".join(problems))

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)  # resolve() reads the others and keeps each value's origin


class Origin(StrEnum):
    """Kinds of sources, highest first."""

    ARGUMENT = "argument"
    ENVIRONMENT = "environment"
    DOTENV = ".env"
    CONFIG = "config"
    PROFILE = "profile"
    DEFAULT = "default"


@dataclass(frozen=True)
class Resolved:
    """Settings and the source of each value.

    Attributes:
        settings: the values.
        origin: source of each setting. Keys of ``engine_args`` are listed as "engine_args.KEY";
            "engine_args" itself only while it is empty.
        labels: the same in words: "environment MOLMO_EDGE_SEED", "config thor.toml".
        profile_name: the profile that was applied, which is what ``settings.profile`` ``"auto"``
            became; ``None`` if none was.
    """

    settings: EdgeSettings
    origin: Mapping[str, Origin]
    labels: Mapping[str, str]
    profile_name: str | None = None

    def chosen(self, name: str) -> bool:
        """Whether the user set it, as opposed to the profile or the default."""
        return self.origin.get(name, Origin.DEFAULT) not in (Origin.PROFILE, Origin.DEFAULT)

    def rows(self) -> Iterator[tuple[str, Any, str]]:
        """Name, JSON value and source of each setting and of each key of ``engine_args``."""
        for name in self.labels:
            setting, _, key = name.partition(".")
            value = getattr(self.settings, setting)
            plain = to_jsonable_python(
                value[key] if key else value, fallback=lambda other: f"<{type(other).__name__}>"
            )
            yield name, plain, self.labels[name]


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
    environment = _Source(Origin.ENVIRONMENT, EnvSettingsSource(EdgeSettings).env_vars)
    dotenv = _Source(Origin.DOTENV, _read_dotenv(Path(".env")))
    if config is None:
        config = environment.config() or dotenv.config()
    # The order of sources, highest first; the profile that they name follows, then the defaults.
    sources = [_Source(Origin.ARGUMENT, arguments), environment, dotenv]
    if config is not None:
        sources.append(_Source(Origin.CONFIG, _read_toml(config), Path(config).name))
    checked = _check(sources)
    profile_name = None
    if profile_settings is not None:
        named = [(v["profile"], s.label("profile")) for s, v in checked if "profile" in v]
        requested, where = named[0] if named else ("auto", str(Origin.DEFAULT))
        try:
            profile_name, values = profile_settings(requested)
        except ConfigError as exc:
            raise ConfigError(f"{exc} (the profile was named by: {where})") from exc
        checked += _check([_Source(Origin.PROFILE, values, profile_name)])
    return _merge(checked, profile_name)


@dataclass(frozen=True)
class _Source:
    """Values of one source, by the names used there: variables or settings."""

    origin: Origin
    values: Mapping[str, Any]
    detail: str = ""

    def label(self, name: str) -> str:
        detail = PREFIX + name.upper() if self.origin is Origin.ENVIRONMENT else self.detail
        return f"{self.origin} {detail}".strip()

    @property
    def text(self) -> bool:
        return self.origin in (Origin.ENVIRONMENT, Origin.DOTENV)

    def config(self) -> str | None:
        given = self.values.get(CONFIG_VARIABLE)
        return str(given).strip() if self._given(given) else None

    def by_setting(self) -> tuple[dict[str, Any], list[str]]:
        """Raw values by setting, and a problem for each unknown name."""
        known = {name: name for name in EdgeSettings.model_fields}
        if self.origin is Origin.PROFILE:
            del known["profile"]  # a profile cannot name another one
        if self.text:
            known = {PREFIX + name.upper(): name for name in known} | {CONFIG_VARIABLE: ""}
        values, problems = {}, []
        for name, value in self.values.items():
            if self.text and not name.upper().startswith(PREFIX):
                continue
            if name not in known:
                where = f"{self.origin} {self.detail}".strip()
                problems.append(
                    f"{where}: unknown name {_show(name)}; the nearest valid name is "
                    f"{_nearest(str(name), known)}"
                )
            elif name != CONFIG_VARIABLE and self._given(value):
                values[known[name]] = value.strip() if self.text else value
        return values, problems

    def _given(self, value: Any) -> bool:
        return value is not None and not (self.text and value.strip().lower() in ("", "none"))


def _check(sources: list[_Source]) -> list[tuple[_Source, dict[str, Any]]]:
    """Validate every value of every source once; raise one error for all problems."""
    checked, problems = [], []
    for source in sources:
        values, unknown = source.by_setting()
        problems += unknown
        for name, value in values.items():
            try:
                values[name] = _validate(name, value, text=source.text)
            except ValidationError as exc:
                problems.append(f"{source.label(name)}: {name} {_explain(exc.errors()[0])}")
            except ValueError as exc:
                problems.append(f"{source.label(name)}: {name} {exc}")
        checked.append((source, values))
    if problems:
        raise ConfigError("\n".join(problems))
    return checked


def _merge(checked: list[tuple[_Source, dict[str, Any]]], profile_name: str | None) -> Resolved:
    values: dict[str, Any] = {"engine_args": {}}
    origin = dict.fromkeys(EdgeSettings.model_fields, Origin.DEFAULT)
    labels = dict.fromkeys(EdgeSettings.model_fields, str(Origin.DEFAULT))
    for source, given in reversed(checked):
        keys = given.pop("engine_args", {})
        values |= given
        values["engine_args"] |= keys
        for name in (*given, *(f"engine_args.{key}" for key in keys)):
            origin[name], labels[name] = source.origin, source.label(name.partition(".")[0])
    if values["engine_args"]:
        del origin["engine_args"], labels["engine_args"]
    settings = EdgeSettings.model_construct(**values)
    return Resolved(settings, MappingProxyType(origin), MappingProxyType(labels), profile_name)


def _validate(name: str, value: Any, *, text: bool) -> Any:
    adapter = _adapter(name)
    if text and name == "engine_args":
        return adapter.validate_python(_json_object(value))
    return adapter.validate_strings(value) if text else adapter.validate_python(value)


@functools.cache
def _adapter(name: str) -> TypeAdapter[Any]:
    info = EdgeSettings.model_fields[name]
    kind: Any = Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation
    return TypeAdapter(kind, config=ConfigDict(strict=True, allow_inf_nan=False))


def _json_object(text: str) -> dict[str, Any]:
    example = 'a JSON object such as {"max_num_batched_tokens": 4096}'
    try:
        table = json.loads(text)
    except json.JSONDecodeError as exc:
        where = f"line {exc.lineno}, column {exc.colno}"
        raise ValueError(f"must be {example}; {exc.msg} at {where}") from None
    except (ValueError, RecursionError):  # an integer of thousands of digits, brackets likewise
        raise ValueError(f"must be {example}, of ordinary size") from None
    if not isinstance(table, dict):
        raise ValueError(f"must be {example}, not {_show(text)}")
    return table


def _read_dotenv(path: Path) -> Mapping[str, str | None]:
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8-sig")
        source = DotEnvSettingsSource(EdgeSettings, path, env_file_encoding="utf-8-sig")
    except OSError as exc:
        raise ConfigError(f"{path.name} cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path.name} is not UTF-8 text: bad byte at {exc.start}") from exc
    # python-dotenv skips a malformed line; one of ours must not be lost.
    for number, line in enumerate(text.splitlines(), start=1):
        name = re.match(rf"\s*(?:export\s+)?({PREFIX}\w*)", line, re.IGNORECASE)
        if name is not None and name[1] not in source.env_vars:
            raise ConfigError(
                f"{path.name} line {number}: not of the form NAME=value; check its quotes"
            )
    return source.env_vars


def _read_toml(config: Path | str) -> Mapping[str, Any]:
    shown = _show(str(config))
    if not isinstance(config, str | Path) or not str(config).strip() or "\0" in str(config):
        raise ConfigError(f"config must be the path of a TOML file, not {shown}")
    try:
        path = Path(config).expanduser()
        if path.stat().st_size > _MAX_CONFIG_BYTES or not path.is_file():
            raise ConfigError(f"config file {shown} is not a file of at most a megabyte")
        values = TomlConfigSettingsSource(EdgeSettings, path).toml_data
    except FileNotFoundError:
        close = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")])
        hint = f"; the nearest file there is {close[0]}" if close else ""
        raise ConfigError(f"config file {shown} does not exist{hint}") from None
    except OSError as exc:
        raise ConfigError(f"config file {shown} cannot be read: {exc.strerror}") from exc
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"config file {shown} is not valid TOML: {exc}") from exc
    except RuntimeError as exc:
        raise ConfigError(f"config file {shown} begins with an unknown home directory") from exc
    if isinstance(values.get("settings"), dict):
        raise ConfigError(f"config {path.name}: move the keys of [settings] to the top level")
    return values


def _explain(error: ErrorDetails) -> str:
    """Describe pydantic's error as the rest of a sentence that begins with the setting's name."""
    kind, given, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "value_error":  # raised by a validator above
        return str(context["error"])
    if kind == "literal_error":
        names = re.findall(r"'([^']*)'", str(context["expected"]))
        close = _nearest(given, names) if isinstance(given, str) else ""
        near = f"; the nearest valid value is {close}" if close else ""
        return f"must be one of {', '.join(names)}, not {_show(given)}{near}"
    if kind in _LIMIT:
        return f"must be {_LIMIT[kind]} {next(iter(context.values()))}, not {_show(given)}"
    return f"must be {_EXPECTED.get(kind.partition('_')[0], 'of another type')}, not {_show(given)}"


def _nearest(name: str, known: Iterable[str]) -> str:
    """The entry of ``known`` most similar to ``name``, ignoring case, ``-`` and ``_``."""
    folded = {entry.lower().replace("-", "_"): entry for entry in known}
    wanted = name[:100].lower().replace("-", "_")  # difflib is quadratic
    return folded[difflib.get_close_matches(wanted, folded, n=1, cutoff=0.0)[0]]


def _show(value: object) -> str:
    """A short text for a wrong value; the type's name where the value is long or opaque."""
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    if value is None or type(value) in (bool, float):
        return repr(value)
    if type(value) is int:
        return repr(value) if value.bit_length() <= 64 else "an integer of more than 64 bits"
    return f"a value of type {type(value).__name__}"
