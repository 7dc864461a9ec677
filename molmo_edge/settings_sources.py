"""Where settings are read: mappings, the environment, a ``.env`` file, a TOML file.

Names in, raw values with their origin out. This module knows nothing of what a value means or
which source beats which; it only refuses a name that is not in the set it was given, because a
misspelt name that is silently ignored is worse than an error.
"""

from __future__ import annotations

import difflib
import io
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dotenv.parser import parse_stream
from dotenv.variables import parse_variables

from molmo_edge.errors import ConfigError

PREFIX = "MOLMO_EDGE_"
CONFIG_VARIABLE = PREFIX + "CONFIG"
"""The one variable that is no setting: it names the TOML config file."""

_MAX_FILE_BYTES = 1 << 20  # a config is a page of text; more is a checkpoint named by mistake
_MAX_NAME_CHARS = 100  # difflib is quadratic


@dataclass(frozen=True)
class Source:
    """What one source gave.

    Attributes:
        values: setting name to value, as given; nothing in it that was "not given".
        origins: setting name to where it came from, in words.
        text: the values are strings that stand for numbers, words, paths or JSON.
        config: the config file this source names, if it does.
        problems: what is wrong with it, a sentence each.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)
    text: bool = False
    config: str | None = None
    problems: tuple[str, ...] = ()


def nearest(name: str, known: Iterable[str]) -> str:
    """The entry of ``known`` most like ``name``; letter case, ``-`` and ``_`` do not count."""
    folded = {entry.lower().replace("-", "_"): entry for entry in known}
    wanted = name[:_MAX_NAME_CHARS].lower().replace("-", "_")
    return folded[difflib.get_close_matches(wanted, folded, n=1, cutoff=0.0)[0]]


def show(value: object) -> str:
    """A short text for a wrong value; the type's name where the value itself is long or opaque."""
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    if value is None or type(value) in (bool, float):
        return repr(value)
    if type(value) is int:
        return repr(value) if value.bit_length() <= 64 else "an integer of more than 64 bits"
    return f"a value of type {type(value).__name__}"


def from_mapping(values: Mapping[str, Any], origin: str, known: Iterable[str]) -> Source:
    """Values that already have their types; ``None`` means "not given"."""
    known = tuple(known)
    problems = tuple(_unknown(origin, name, known) for name in values if name not in known)
    given = {name: v for name, v in values.items() if name in known and v is not None}
    return Source(given, dict.fromkeys(given, origin), problems=problems)


def from_environment(environ: Mapping[str, str], known: Iterable[str]) -> Source:
    """Every ``MOLMO_EDGE_*`` variable. Names are upper case; ``none`` and empty: not given."""
    found = ((name, text, f"environment {name}", "environment") for name, text in environ.items())
    return _from_strings(found, known)


def from_dotenv(path: Path | None, environ: Mapping[str, str], known: Iterable[str]) -> Source:
    """The ``MOLMO_EDGE_*`` lines of a ``.env`` file; other programs' lines are left alone.

    ``${NAME}`` stands for an earlier line of the file or a variable of ``environ``. A missing
    file is an empty one, and so is a folder of that name (a virtual environment is often one).

    Raises:
        ConfigError: the file cannot be read or is no text.
    """
    if path is None or not _exists(path, f"{path.name} file") or path.is_dir():
        return Source(text=True)
    found: list[tuple[str, str | None, str, str]] = []
    broken: list[str] = []
    scope: dict[str, str | None] = {}
    for binding in parse_stream(io.StringIO(_read_text(path, f"{path.name} file"))):
        where = f"{path.name} line {_first_line(binding.original.string, binding.original.line)}"
        if binding.error and PREFIX in binding.original.string.upper():
            broken.append(f"{where}: not of the form NAME=value; check its quotes")
        if binding.key is None:
            continue
        text = binding.value
        if text is not None:
            text = "".join(atom.resolve({**environ, **scope}) for atom in parse_variables(text))
        scope[binding.key] = text
        found.append((binding.key, text, path.name, where))
    source = _from_strings(found, known)
    return replace(source, problems=(*broken, *source.problems))


def from_toml(path: Path | str | None, known: Iterable[str]) -> Source:
    """A config file: settings at the top level and the one table ``[engine_args]``.

    Raises:
        ConfigError: the file is missing, unreadable or no TOML; with line and column.
    """
    if path is None:
        return Source()
    if not isinstance(path, str | Path) or not str(path).strip() or not str(path).isprintable():
        given = show(str(path) if isinstance(path, Path) else path)
        raise ConfigError(f"config must be the path of a TOML file, not {given}")
    try:
        path = Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"config file {path} begins with an unknown home folder") from None
    if not _exists(path, "config file"):
        raise ConfigError(
            f"config file {path}, from the argument config or {CONFIG_VARIABLE}, does not exist"
            f"{_sibling(path)}"
        )
    text = _read_text(path, "config file")
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise ConfigError(f"config file {path}: nested too deeply") from None
    except ValueError as exc:  # TOMLDecodeError, or an integer with thousands of digits
        raise ConfigError(f"config file {path} is not valid TOML: {exc}") from exc
    origin = f"config {path.name}"
    if isinstance(table.get("settings"), dict):
        raise ConfigError(
            f"{origin}: unknown table [settings]; in a config file the settings stand at the top "
            "level, without a table"
        )
    return from_mapping(table, origin, known)


def _from_strings(
    found: Iterable[tuple[str, str | None, str, str]], known: Iterable[str]
) -> Source:
    """From (variable, text, origin of its value, where to point when its name is wrong)."""
    settings = {PREFIX + name.upper(): name for name in known}
    variables = (*settings, CONFIG_VARIABLE)
    texts: dict[str, tuple[str, str]] = {}
    problems: list[str] = []
    for variable, text, origin, where in found:
        if not variable.upper().startswith(PREFIX):
            continue
        if variable not in variables:
            problems.append(_unknown(where, variable, variables))
            continue
        texts.pop(variable, None)  # the last line of a file wins, also when it unsets
        stripped = (text or "").strip()
        if stripped.lower() not in ("", "none"):
            texts[variable] = (stripped, origin)
    config = texts.pop(CONFIG_VARIABLE, (None, ""))[0]
    return Source(
        values={settings[variable]: text for variable, (text, _) in texts.items()},
        origins={settings[variable]: origin for variable, (_, origin) in texts.items()},
        text=True,
        config=config,
        problems=tuple(problems),
    )


def _unknown(origin: str, name: object, known: Iterable[str]) -> str:
    if not isinstance(name, str):
        return f"{origin}: a setting's name must be text, not {show(name)}"
    return f"{origin}: unknown name {show(name)}; the nearest valid name is {nearest(name, known)}"


def _exists(path: Path, what: str) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError) as exc:  # no permission, a name too long, a NUL in it
        reason = exc.strerror if isinstance(exc, OSError) else str(exc)
        raise ConfigError(f"{what} {show(str(path))} cannot be read: {reason}") from exc


def _read_text(path: Path, what: str) -> str:
    try:
        if not path.is_file():
            raise ConfigError(f"{what} {path} is not a regular file")
        size = path.stat().st_size
        if size > _MAX_FILE_BYTES:
            raise ConfigError(f"{what} {path} has {size} bytes, more than a megabyte of settings")
        return path.read_text(encoding="utf-8-sig")
    except OSError as exc:
        raise ConfigError(f"{what} {path} cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{what} {path} is not UTF-8 text: bad byte at {exc.start}") from exc


def _sibling(path: Path) -> str:
    """A hint when the folder is there and the name in it is misspelt."""
    try:
        names = [entry.name for entry in path.parent.glob("*.toml")]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; the nearest file there is {close[0]}" if close else ""


def _first_line(original: str, line: int) -> int:
    """The parser counts a binding from the blank lines before it."""
    return line + original[: len(original) - len(original.lstrip())].count("\n")
