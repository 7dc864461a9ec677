"""The table of answers on disk: Parquet parts, each whole, in the order of the source."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import sqlite3
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

from blake3 import blake3

from molmo_edge.errors import ConfigError
from molmo_edge.files import expand_home, lock, replacing, scratch
from molmo_edge.images import printable
from molmo_edge.label.sources import Row, parquet_file, pyarrow

KEY = b"molmo_edge"
_PART = re.compile(r"part-\d{6,}\.parquet")
MIN_FREE_BYTES = 16 * 2**20


class _Part(NamedTuple):
    path: Path
    rows: int
    # `first` row's number, `configuration`, `environment`, `errors`, `names`; None for no part.
    about: Any


class Output:
    """A directory of parts that a run goes on with where the last one stopped, as a context.

    A part holds rows that follow one another in the source, so the number of rows that are done
    says where to go on. A hash over the names and places of rows tells a source that has changed.

    Attributes:
        done, errors: rows that are in parts or wait for the next one, and those with an error.
        environment: of the engine, stored in each part.

    Args:
        configuration: what answers depend on, as JSON; equal in all parts.
        flush_s, flush_rows: a part is written when its first row is older, or it has as many rows.
        restart: delete the parts that are there, once the first one of this run is due.

    Raises:
        ConfigError: the directory cannot be used, belongs to another run or to a running one.
    """

    def __init__(
        self,
        directory: Path,
        schema: Any,
        configuration: Mapping[str, Any],
        *,
        flush_s: float,
        flush_rows: int,
        restart: bool,
    ) -> None:
        self.directory = expand_home(directory)
        self.environment: Mapping[str, Any] = {}
        self._schema = schema
        self._configuration = json.loads(json.dumps(configuration, default=str))
        self._flush_s, self._flush_rows = flush_s, flush_rows
        self._rows: list[Mapping[str, Any]] = []
        self._oldest = 0.0
        self._names = blake3()  # of the rows that are done
        self._listed: deque[bytes] = deque()  # of those that follow
        with self._writing(), ExitStack() as failed:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
            failed.callback(os.close, self._lock)
            if shutil.disk_usage(self.directory).free < MIN_FREE_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            parts = self._read_parts(restart)
            self._old = [part.path for part in parts] if restart else []
            self._parts = [] if restart else parts
            with scratch(self.directory):
                pass  # it can be written to
            failed.pop_all()
        self.done = sum(part.rows for part in self._parts)
        self.errors = sum(part.about["errors"] for part in self._parts)

    def _take_lock(self) -> int:
        file = self.directory / ".lock"
        file.touch()
        try:
            return lock(file, fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"Another process is writing to {printable(self.directory)}."
            ) from None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Translates what writing to the directory raises."""
        try:
            yield
        except OSError as exc:
            raise ConfigError(
                f"{printable(self.directory)} cannot be written: {exc.strerror or exc}. Parts "
                "that are there are whole; the same command goes on with them."
            ) from exc

    def _read_parts(self, restart: bool) -> list[_Part]:
        names = [one.name for one in self.directory.iterdir() if one.name[0] != "."]
        ours = sorted(filter(_PART.fullmatch, names), key=lambda name: int(name[5:-8]))
        parts = [_read_part(self.directory / name, restart) for name in ours]
        foreign = [name for name in names if name not in ours]
        foreign += [part.path.name for part in parts if part.about is None]
        if foreign:
            raise ConfigError(
                f"{printable(self.directory)} has files of something else, such as {foreign[0]}; "
                "give an empty or new directory."
            )
        if restart or not parts:
            return parts
        first = 0
        for number, part in enumerate(parts):
            if part.path.name != _part_name(number) or part.about["first"] != first:
                raise ConfigError(
                    f"A part before {printable(part.path)} is missing; put it back, or label "
                    "everything anew with --restart."
                )
            first += part.rows
        if (old := parts[-1].about["configuration"]) != self._configuration:
            new = self._configuration
            changed = sorted(name for name in old | new if old.get(name) != new.get(name))
            values = [
                f"{name}: {old.get(name)!r:.90}, now {new.get(name)!r:.90}" for name in changed
            ]
            raise ConfigError(
                f"{printable(self.directory)} was begun with {'; '.join(values)}. Give another "
                "directory, or --restart to label everything anew."
            )
        return parts

    def skip_done(self, rows: Iterator[Row]) -> Iterator[Row]:
        """Return the rows that are left. Raises ConfigError for a source that has changed."""
        self._names = blake3()
        self._listed.clear()
        for _ in range(self.done):
            self._names.update(_name(next(rows, None)))
        if self._parts and self._names.hexdigest() != self._parts[-1].about["names"]:
            raise ConfigError(
                f"The source has changed: its first {self.done} rows are not those that are in "
                f"{printable(self.directory)} already. Give another directory for the new source, "
                "or --restart to label everything anew."
            )
        return self._remembered(rows)

    def _remembered(self, rows: Iterator[Row]) -> Iterator[Row]:
        for row in rows:
            self._listed.append(_name(row))
            yield row

    def written(self) -> Iterator[dict[str, Any]]:
        """The rows of all parts, read one part at a time."""
        for part in self._parts:
            yield from parquet_file(part.path).read().to_pylist()

    def add(self, row: Mapping[str, Any]) -> None:
        """Take the row that follows in the source; write a part when one is due."""
        now = time.monotonic()
        self._oldest = self._oldest if self._rows else now
        self._rows.append(row)
        self._names.update(self._listed.popleft())
        self.done += 1
        self.errors += row["error"] is not None
        if len(self._rows) >= self._flush_rows or now - self._oldest >= self._flush_s:
            self.flush()

    def flush(self) -> None:
        """Write what waits as a part. Raises ConfigError, and keeps the rows, if it cannot."""
        if not self._rows:
            return
        pa = pyarrow()
        about = {
            "configuration": self._configuration,
            "environment": self.environment,
            "first": self.done - len(self._rows),
            "errors": sum(row["error"] is not None for row in self._rows),
            "names": self._names.hexdigest(),
        }
        metadata = {KEY: json.dumps(about, default=str).encode()}
        table = pa.Table.from_pylist(self._rows, self._schema.with_metadata(metadata))
        path = self.directory / _part_name(len(self._parts))
        with self._writing():
            for old in reversed(self._old):  # what is left after a kill begins at the first
                old.unlink(missing_ok=True)
            self._old = []
        with self._writing(), replacing(path) as temporary, temporary.open("wb") as file:
            pa.parquet.write_table(table, file)
            file.flush()
            os.fsync(file.fileno())  # before the rename, for whoever pulls the plug
        self._parts.append(_Part(path, len(self._rows), about))
        self._rows = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.flush()
        finally:
            os.close(self._lock)


def _name(row: Row | None) -> bytes:
    return json.dumps(row).encode()


def _part_name(number: int) -> str:
    return f"part-{number:06d}.parquet"


def _read_part(path: Path, broken_too: bool) -> _Part:
    """Read what a part says of itself. Raises ConfigError for a broken one unless `broken_too`."""
    try:
        file = parquet_file(path)
    except Exception as exc:  # pyarrow has a dozen
        if broken_too:
            return _Part(path, 0, {})
        raise ConfigError(
            f"{printable(path)} is no whole Parquet file ({type(exc).__name__}); remove it and the "
            "parts after it, or label everything anew with --restart."
        ) from exc
    try:
        about = json.loads((file.schema_arrow.metadata or {})[KEY])
        known = {"configuration", "first", "errors", "names"} <= about.keys()
    except (KeyError, ValueError, AttributeError):
        known = False
    return _Part(path, file.metadata.num_rows, about if known else None)


class Answered:
    """Answers by content hash, in a temporary database on disk."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._database = sqlite3.connect("")
        self._database.execute("CREATE TABLE answers (hash TEXT PRIMARY KEY, row TEXT)")
        for row in rows:
            self.add(row)

    def add(self, row: Mapping[str, Any]) -> None:
        """Remember the answers of a row, its error included; nothing of one without a hash."""
        if row["hash"] is not None:
            values = row["hash"], json.dumps(row)
            self._database.execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", values)

    def find(self, hash: str | None) -> dict[str, Any] | None:
        """Return the answers about an image of this content, None if there are none."""
        query = "SELECT row FROM answers WHERE hash = ?"
        found = self._database.execute(query, (hash,)).fetchone()
        if found is None:
            return None
        return {**json.loads(found[0]), "tokens": 0, "seconds": 0.0}
