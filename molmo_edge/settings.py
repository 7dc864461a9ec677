"""Settings: which there are, what they may be, and which source wins.

``resolve()`` states the order of sources; ``settings_sources`` reads them and
``settings_checks`` has the words for a wrong value. This module knows neither what a profile
holds nor how a value reaches vLLM.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from molmo_edge.errors import ConfigError
from molmo_edge.settings_checks import (
    EngineArgs,
    Folder,
    KVCacheDtype,
    Line,
    Precision,
    explain,
    json_object,
)
from molmo_edge.settings_sources import (
    Source,
    from_dotenv,
    from_environment,
    from_mapping,
    from_toml,
)

if TYPE_CHECKING:
    from rich.table import Table

_CONFIG = SettingsConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class EdgeSettings(BaseSettings):
    """The settings of one engine: checked, frozen, nothing unknown in them.

    Booleans are not numbers here, and infinities and NaN are refused everywhere. Building one
    directly reads no environment and no file: ``resolve()`` does.

    Attributes:
        model: folder or hub name of a checkpoint; ``stub`` is the small built-in one.
        profile: device profile by name; ``auto`` detects the device.
        precision: of the language model's dense weights; ``auto``: as the profile says.
        dtype: of activations and unquantised weights; ``auto``: as the checkpoint says.
        kv_cache_dtype: of the KV cache, by vLLM's name.
        max_model_len: tokens of prompt (image included) and answer together, 64 or more.
        max_num_seqs: requests decoded together, 1 to 1024.
        max_crops: high-resolution crops of a picture, 1 to 32, beside the global view.
        resize: ``torch`` (float32, as the reference within 4.4e-4) or ``tensorflow`` (the
            reference's own).
        load_format: vLLM's name of the checkpoint's format; ``dummy`` gives random weights.
        seed: of the engine, 0 to 2**32 - 1.
        gpu_memory_utilization: share of the device's memory vLLM may take, above 0, at most 1.
        kv_cache_memory_gb: size of the KV cache in GiB (2**30 bytes, as vLLM counts GB).
        attention_backend, mm_encoder_attn_backend: vLLM's backend names, for the language model
            and for the vision tower.
        enforce_eager: no torch.compile and no CUDA graphs.
        enable_prefix_caching: reuse the KV cache of equal prompt beginnings.
        mm_processor_cache_gb: cache of preprocessed pictures in GiB, 0 for none.
        speculation: ``ngram`` drafts tokens from the prompt.
        engine: ``thread`` runs in this process; ``process`` in a child, for applications whose own
            Python code is busy (the main script must be importable, as with multiprocessing).
        max_queue: requests that may wait before new ones are refused.
        stall_s: seconds after which a single engine step is reported as a stall.
        cache_dir: root of every cache on disk; ``~`` is the home folder.
        max_image_bytes: largest encoded picture, in bytes.
        max_image_pixels: largest decoded picture, in pixels.
        engine_args: further arguments of ``vllm.LLM``, handed on as given.

    Raises:
        ConfigError: a name is unknown or a value wrong.
    """

    model_config = _CONFIG

    model: Line = "stub"
    profile: Line = "auto"
    precision: Precision = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    kv_cache_dtype: KVCacheDtype = "fp8"
    max_model_len: Annotated[int, Field(ge=64)] | None = None
    max_num_seqs: Annotated[int, Field(ge=1, le=1024)] = 8
    max_crops: Annotated[int, Field(ge=1, le=32)] = 12
    resize: Literal["torch", "tensorflow"] = "torch"
    load_format: Line = "auto"
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0  # NumPy's range, which vLLM seeds too
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    kv_cache_memory_gb: Annotated[float, Field(gt=0)] | None = None
    attention_backend: Line | None = None
    mm_encoder_attn_backend: Line | None = None
    enforce_eager: bool | None = None
    enable_prefix_caching: bool = False
    mm_processor_cache_gb: Annotated[float, Field(ge=0)] = 0.0
    speculation: Literal["off", "ngram"] = "off"
    engine: Literal["thread", "process"] = "thread"
    max_queue: Annotated[int, Field(ge=1)] = 256
    stall_s: Annotated[float, Field(gt=0)] = 120.0
    cache_dir: Folder | None = None
    max_image_bytes: Annotated[int, Field(ge=1)] = 64 * 2**20
    max_image_pixels: Annotated[int, Field(ge=1)] = 64_000_000
    engine_args: EngineArgs = Field(default_factory=dict)

    def __init__(self, **values: Any) -> None:
        source = _typed(from_mapping(values, "argument", type(self).model_fields))
        _refuse([source])
        super().__init__(**source.values)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # pydantic-settings passes over a misspelt variable in silence, so resolve() reads them.
        return (init_settings,)


@dataclass(frozen=True)
class Resolved:
    """Settings and where each value came from.

    Attributes:
        settings: the values.
        origin: setting to "argument", "environment MOLMO_EDGE_X", ".env", "config NAME.toml",
            "profile NAME" or "default". ``engine_args`` is there a key at a time, as
            "engine_args.KEY", and as "engine_args" only while it is empty.
        profile_name: the profile whose values are in it, which is what ``settings.profile``
            ``"auto"`` became; ``None`` if none was asked for.
    """

    settings: EdgeSettings
    origin: Mapping[str, str]
    profile_name: str | None = None

    def rows(self) -> Iterator[tuple[str, Any, str]]:
        """Name, value and origin of each setting; one row for each key of ``engine_args``."""
        for name in type(self.settings).model_fields:
            value = getattr(self.settings, name)
            if name == "engine_args" and value:
                for key in sorted(value):
                    yield f"{name}.{key}", value[key], self.origin[f"{name}.{key}"]
            else:
                yield name, value, self.origin[name]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: ``{"profile": name, "settings": {name: {"value": …, "origin": …}}}``."""
        rows = {n: {"value": _plain(v), "origin": origin} for n, v, origin in self.rows()}
        return {"profile": self.profile_name, "settings": rows}


def resolve(
    arguments: Mapping[str, Any],
    *,
    config: Path | str | None = None,
    profile_settings: Callable[[str], tuple[str, Mapping[str, Any]]] | None = None,
    environ: Mapping[str, str] | None = None,
    dotenv: Path | None = Path(".env"),
) -> Resolved:
    """Settings from every source: the higher one wins, and a wrong name or value in any is refused.

    Args:
        arguments: what the caller gave; a value ``None`` counts as not given.
        config: a TOML file, ``MOLMO_EDGE_CONFIG`` if ``None``.
        profile_settings: from the profile's name as asked for (``auto`` included) to its actual
            name and its values. Called once, when the higher sources have named the profile.
        environ: the environment, ``os.environ`` if ``None``.
        dotenv: the ``.env`` file, looked at if it exists; ``None`` for none.

    Raises:
        ConfigError: with a line for everything wrong, saying in which source.
    """
    names = EdgeSettings.model_fields
    environ = os.environ if environ is None else environ
    # The order of sources, highest first.
    argument = from_mapping(arguments, "argument", names)
    environment = from_environment(environ, names)
    local = from_dotenv(dotenv, environ, names)
    file = from_toml(config if config is not None else environment.config or local.config, names)
    sources = [_typed(source) for source in (argument, environment, local, file, _defaults())]
    _refuse(sources)
    chosen = None
    if profile_settings is not None:
        asked, origin = next(
            (s.values["profile"], s.origins["profile"]) for s in sources if "profile" in s.values
        )
        try:
            chosen, values = profile_settings(asked)
        except ConfigError as exc:
            raise ConfigError(f"{exc} (the profile was named by: {origin})") from exc
        above = [name for name in names if name != "profile"]  # a profile cannot name another
        profile = _typed(from_mapping(values, f"profile {chosen}", above))
        _refuse([profile])
        sources.insert(-1, profile)
    return _merged(sources, chosen)


def settings_table(resolved: Resolved) -> Table:
    """A rich table of every setting, its value and where it came from."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"Settings (profile {resolved.profile_name or 'not used'})")
    for heading in ("setting", "value", "from"):
        table.add_column(heading, overflow="fold")
    for name, value, origin in resolved.rows():
        plain = _plain(value)
        text = plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)
        # Text, not str: brackets in a value are no markup.
        table.add_row(Text(name), Text("not set" if value is None else text), Text(origin))
    return table


def _merged(sources: Iterable[Source], profile_name: str | None) -> Resolved:
    """The first source wins: a setting at a time, and within ``engine_args`` a key at a time."""
    values: dict[str, Any] = {"engine_args": {}}
    origin: dict[str, str] = {}
    for source in sources:
        for name, value in source.values.items():
            if name == "engine_args":
                for key in value:
                    if key not in values[name]:
                        values[name][key] = value[key]
                        origin[f"{name}.{key}"] = source.origins[name]
            elif name not in values:
                values[name], origin[name] = value, source.origins[name]
    if not values["engine_args"]:
        origin["engine_args"] = "default"
    return Resolved(EdgeSettings(**values), MappingProxyType(origin), profile_name)


def _defaults() -> Source:
    """Every setting; the unset ones are ``None`` here and nowhere else."""
    fields = EdgeSettings.model_fields.items()
    values = {name: info.get_default(call_default_factory=True) for name, info in fields}
    return Source(values, dict.fromkeys(values, "default"))


def _typed(source: Source) -> Source:
    """The source with its values checked and typed, and a problem for each that is wrong."""
    values: dict[str, Any] = {}
    problems = list(source.problems)
    for name, given in source.values.items():
        try:
            values[name] = _checked(name, given, source.text)
        except ValidationError as exc:
            wrong = explain(exc.errors(include_url=False)[0], given)
            problems.append(f"{source.origins[name]}: {name} {wrong}")
        except ValueError as exc:
            problems.append(f"{source.origins[name]}: {name} {exc}")
    return replace(source, values=values, problems=tuple(problems))


def _checked(name: str, given: Any, text: bool) -> Any:
    if text and name == "engine_args":
        return _adapter(name).validate_python(json_object(given))
    return _adapter(name).validate_strings(given) if text else _adapter(name).validate_python(given)


@functools.cache
def _adapter(name: str) -> TypeAdapter[Any]:
    info = EdgeSettings.model_fields[name]
    kind: Any = Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation
    config = ConfigDict(strict=_CONFIG["strict"], allow_inf_nan=_CONFIG["allow_inf_nan"])
    return TypeAdapter(kind, config=config)


def _refuse(sources: Iterable[Source]) -> None:
    problems = [problem for source in sources for problem in source.problems]
    if problems:
        raise ConfigError("\n".join(problems))


def _plain(value: Any) -> Any:
    """JSON's types; the type's name for a value that has no such form."""
    return to_jsonable_python(value, fallback=lambda other: f"<{type(other).__name__}>")
