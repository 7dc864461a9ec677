"""Rows of whatever is to be labelled: where each image is, and its bytes.

A directory, image files, tables (Parquet, JSON Lines), WebDataset shards (.tar) and videos are
listed as rows, which are small, always in the same order; another thread, process or machine that
sees the same files can read a row's image.
"""

from __future__ import annotations

import base64
import json
import os
import re
import tarfile
import urllib.parse
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from molmo_edge.errors import ConfigError, ImageError, MissingDependencyError, MolmoEdgeError
from molmo_edge.files import expand_home
from molmo_edge.images import (
    SUFFIXES,
    URL,
    ImageLike,
    ImageLimits,
    check_bytes,
    open_file,
    printable,
)
from molmo_edge.settings import EdgeSettings
from molmo_edge.video import Frame, VideoLimits, frame_times, read_frames

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".ts", ".gif")
# Names of a table's column of images, best first, where none is given.
IMAGE_COLUMNS = ("image", "path", "file", "file_name", "filename", "uri", "bytes")
_KINDS = frozenset((*SUFFIXES, *VIDEO_SUFFIXES, ".parquet", ".jsonl", ".ndjson", ".tar"))
_GLOB = frozenset("*?[")
_DATA = re.compile("data:", re.IGNORECASE)
FPS = 1.0


class Row(NamedTuple):
    """Where one image is.

    Attributes:
        row: its name in the output, the same in every run.
        path: of the file it is in; empty where there is none, and `at` says why.
        at: where in that file, for the reader of its kind; empty for a file of one image.
    """

    row: str
    path: str
    at: str = ""


class Limits(NamedTuple):
    """Caps on what is read."""

    image: ImageLimits = ImageLimits()
    video: VideoLimits = VideoLimits()

    @classmethod
    def of(cls, settings: EdgeSettings) -> Limits:
        """Those of an engine."""
        return cls(
            ImageLimits(settings.max_image_bytes, settings.max_image_pixels),
            VideoLimits(settings.max_video_bytes, settings.max_image_pixels, settings.max_video_s),
        )


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Source:
    """What is to be labelled.

    Attributes:
        names: directories, which are searched for images; image files; Parquet and JSON Lines
            tables with a column of paths, ``file:`` URIs or images; WebDataset shards; videos; and
            patterns of such names, with ``**`` for any directories.
        image_column: of tables; by default the first of `IMAGE_COLUMNS` that is there.
        id_column: of tables, whose values name the rows; by default rows are numbered.
        fps: frames for each second of a video.
    """

    names: Sequence[str]
    image_column: str | None = None
    id_column: str | None = None
    fps: float = FPS

    def __post_init__(self) -> None:
        """Raise ConfigError for what names nothing."""
        names = [self.names] if isinstance(self.names, str | Path) else self.names
        if not isinstance(names, list | tuple) or not names:
            raise ConfigError("A source is named by a list of paths and patterns.")
        if not all(isinstance(one, str | Path) and str(one) for one in names):
            raise ConfigError("A source is named by paths and patterns, none of them empty.")
        if not isinstance(self.fps, int | float) or not 0 < self.fps <= 1000:
            raise ConfigError("fps must be above 0 and at most 1000.")
        object.__setattr__(self, "names", tuple(map(str, names)))

    def rows(self, limits: Limits = DEFAULT_LIMITS) -> Iterator[Row]:
        """All rows, in an order that depends on names alone.

        Raises:
            ConfigError: a source is not there, cannot be read, is of no known kind, or a table has
                no such column.
        """
        for name in self.names:
            with _translated(name, ConfigError):
                matches = _matches(name)
            for path in matches:
                with _translated(path, ConfigError):
                    file = self._file(path, limits.video) if path.is_file() else None
                    for row, place, at in self._directory(path) if file is None else file:
                        # Names of files may be no text, and another process has another directory.
                        text = row.encode(errors="backslashreplace").decode()
                        yield Row(text, place and str(Path(place).absolute()), at)

    def _directory(self, top: Path) -> Iterator[Row]:
        prefix = "" if len(self.names) == 1 else f"{top}/"
        for directory, below, files in os.walk(top, onerror=_raise):
            below[:] = sorted(name for name in below if name[0] != ".")
            for file in sorted(files):
                if file.lower().endswith(SUFFIXES) and file[0] != ".":
                    path = Path(directory, file)
                    yield Row(f"{prefix}{path.relative_to(top).as_posix()}", str(path))

    def _file(self, path: Path, limits: VideoLimits) -> Iterator[Row]:
        suffix = path.suffix.lower()
        if suffix in SUFFIXES:
            yield Row(str(path), str(path))
        elif suffix == ".parquet":
            yield from self._parquet(path)
        elif suffix in (".jsonl", ".ndjson"):
            yield from self._json_lines(path)
        elif suffix == ".tar":
            yield from _shard(path)
        elif suffix in VIDEO_SUFFIXES:
            for time in frame_times(path, self.fps, limits):
                yield Row(f"{path}#t={time:.3f}", str(path), f"{self.fps}@{time!r}")
        else:
            raise ConfigError(
                f"{printable(path)}: the name ends neither as an image nor as a table (.parquet, "
                ".jsonl), a shard (.tar) or a video."
            )

    def _find_column(self, names: Iterable[str]) -> str | None:
        wanted = IMAGE_COLUMNS if self.image_column is None else (self.image_column,)
        return next((one for one in wanted if one in names), None)

    def _column(self, path: Path, names: Iterable[str]) -> str:
        """The table's column of images; also checks that of ids. Raises ConfigError."""
        known = list(names)
        column = self._find_column(known)
        wanted = [self.image_column] if self.image_column else IMAGE_COLUMNS
        missing = [one for one in [self.id_column] if one is not None and one not in known]
        if column is None or missing:
            raise ConfigError(
                f"{printable(path)} has no column {' or '.join(missing or wanted)}; it has "
                f"{', '.join(known) or 'none'}."
            )
        return column

    def _parquet(self, path: Path) -> Iterator[Row]:
        file = parquet_file(path)
        column = self._column(path, file.schema_arrow.names)
        kind, number = _kind(path, file.schema_arrow.field(column)), 0
        columns = [one for one in (column if kind == "path" else None, self.id_column) if one]
        for group in range(file.num_row_groups):
            about = file.metadata.row_group(group)
            table = file.read_row_group(group, columns=columns).to_pydict() if columns else {}
            ids = table[self.id_column] if self.id_column else [None] * about.num_rows
            for i, value in enumerate(table[column] if kind == "path" else ids):
                name = str(ids[i]) if ids[i] is not None else f"{path}#{number}"
                if kind == "path" and not _DATA.match(str(value)):
                    yield Row(name, *_place(path, value))
                else:
                    # With the size, so that another table of this name is not taken for this one.
                    yield Row(name, str(path), f"{group}.{i}.{about.total_byte_size}.{column}")
                number += 1

    def _json_lines(self, path: Path) -> Iterator[Row]:
        with path.open("rb") as file:
            place, column = 0, ""
            for number, line in enumerate(file):
                if line.strip():
                    entry = _entry(path, line, number)
                    # The first line has to have one; another without is an error of its row.
                    first = column or self._column(path, entry)
                    column = self._find_column(entry) or first
                    key = None if self.id_column is None else entry.get(self.id_column)
                    name = str(key) if key is not None else f"{path}#{number}"
                    if column == "bytes" or _DATA.match(str(entry.get(column))):
                        yield Row(name, str(path), f"{place}.{column}")
                    else:
                        yield Row(name, *_place(path, entry.get(column)))
                place += len(line)


def _raise(error: OSError) -> None:
    raise error


def _matches(name: str) -> list[Path]:
    """The path of that name, or those that a pattern matches, sorted."""
    path = expand_home(name)
    if URL.match(name):
        raise ConfigError(
            f"{printable(name)}: molmo_edge fetches nothing; copy the files here, or read them "
            "with Ray Data (docs/scale.md)."
        )
    if _GLOB & set(name) and not path.exists():
        top = Path(path.anchor)
        found = sorted(one for one in top.glob(str(path.relative_to(top))) if one.name[0] != ".")
        if not found:
            raise ConfigError(f"Nothing matches {printable(name)}.")
        return [one for one in found if one.suffix.lower() in _KINDS] or found
    if not path.exists():
        raise ConfigError(f"There is no {printable(name)}.")
    return [path]


def _place(table: Path, value: object) -> tuple[str, str]:
    """Path of a table's image, and that nothing more is to be said, or what is wrong with it."""
    text = value if isinstance(value, str) else ""
    if text.startswith("file:"):
        try:
            text = urllib.parse.unquote(urllib.parse.urlsplit(text).path)
        except ValueError:
            text = ""
    if not text or URL.match(text):
        return "", "the table has no local path here: molmo_edge fetches nothing"
    return str(table.parent / text), ""


def _entry(path: Path, line: bytes, number: int) -> Mapping[str, Any]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict):
        raise ConfigError(f"{printable(path)}: line {number + 1} is not a JSON object.")
    return entry


def pyarrow() -> Any:
    """The package of that name. Raises MissingDependencyError."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as exc:
        raise MissingDependencyError(
            'Tables of labels need pyarrow: pip install "molmo-edge[label]".'
        ) from exc
    return pyarrow


def parquet_file(path: Path) -> Any:
    """Open a Parquet file. Raises what pyarrow does."""
    return pyarrow().parquet.ParquetFile(path)


def _kind(path: Path, field: Any) -> str:
    """Whether a column has paths or images, alone or as Hugging Face datasets store them."""
    types = pyarrow().types
    if types.is_dictionary(field.type):
        field = field.with_type(field.type.value_type)
    text = types.is_string(field.type) or types.is_large_string(field.type)
    if types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
        field = field.type.field("bytes")
    if not text and not types.is_binary(field.type) and not types.is_large_binary(field.type):
        raise ConfigError(
            f"{printable(path)}: the column {field.name} is of type {field.type}; a column of "
            "images has paths, file: URIs, or the bytes of encoded images."
        )
    return "path" if text else "bytes"


def _shard(path: Path) -> Iterator[Row]:
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as shard:
        while (member := shard.next()) is not None:
            name = Path(member.name).name
            if member.isreg() and name.lower().endswith(SUFFIXES) and name[0] != ".":
                at = f"{member.offset_data}+{member.size}"
                yield Row(f"{path}/{member.name}", str(path), at)
        # tarfile takes a damaged header for the end, which is a block of zeros.
        file.seek(max(0, file.tell() - 512))
        if file.read(512) != bytes(512):
            raise ConfigError(f"{printable(path)} is damaged or cut short.")


@contextmanager
def _translated(path: str | Path, error: type[MolmoEdgeError]) -> Iterator[None]:
    """Translate whatever reading a file raises into `error`."""
    try:
        yield
    except (error, MissingDependencyError):
        raise
    except MolmoEdgeError as exc:
        raise error(str(exc)) from exc
    except Exception as exc:  # pyarrow, tarfile and json have a dozen
        raise error(
            f"{printable(path)} cannot be read ({type(exc).__name__}); the cause is chained to "
            "this error"
        ) from exc


class Reader:
    """Reads the images of rows, fastest in the order in which they were listed."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        # What the last row was read from, at which place, and what goes on from there.
        self._key: tuple[object, ...] = ()
        self._at = 0.0
        self._cursor: Generator[tuple[float, Any], None, None] | None = None

    def read(self, row: Row) -> ImageLike:
        """Return an encoded image or a frame.

        Raises:
            ImageError: there is none.
        """
        if not row.path:
            raise ImageError(row.at)
        with _translated(row.path, ImageError):
            return self._read(Path(row.path), row.at)

    def _read(self, path: Path, at: str) -> ImageLike:
        suffix = path.suffix.lower()
        if not at or suffix == ".tar":
            start, size = map(int, at.split("+")) if at else (0, None)
            return self._bytes(path, start, size)
        if suffix == ".parquet":
            group, index, _, column = at.split(".", 3)
            key = path, int(group), column
            return self._encoded(path, self._find(key, _cells, float(index)))
        if suffix in VIDEO_SUFFIXES:
            fps, time = map(float, at.split("@"))
            frame: Frame = self._find((path, fps, self._limits.video), read_frames, time)
            return frame
        start_of_line, column = at.split(".", 1)
        with path.open("rb") as file:
            file.seek(int(start_of_line))
            text = str(json.loads(file.readline())[column])
        return text if _DATA.match(text) else base64.b64decode(text, validate=True)

    def _bytes(self, path: Path, start: int, size: int | None) -> bytes:
        with open_file(path, "an image", "", ImageError) as file:
            most = self._limits.image.max_bytes
            if size is None:
                size = check_bytes(file, "image", most, ImageError)
            elif size > most:
                raise ImageError(f"the image has more than {most} bytes, the limit")
            file.seek(start)
            return file.read(size)

    def _encoded(self, path: Path, value: Any) -> ImageLike:
        """The image of a table's cell, which Hugging Face datasets give bytes or a path."""
        if isinstance(value, Mapping):
            value = value["bytes"] if value["bytes"] is not None else value.get("path")
            if isinstance(value, str):
                return self._bytes(path.parent / value, 0, None)
        if value is None:
            raise ImageError("the table has no image here")
        return str(value) if isinstance(value, str) else bytes(value)

    def _find(self, key: tuple[Any, ...], cursor: Callable[..., Any], at: float) -> Any:
        """What `cursor(*key)` yields at a place; one that failed is not tried again."""
        if self._key != key or at <= self._at:
            self.close()
            self._key, self._cursor = key, cursor(*key)
        self._at = at
        for place, value in self._cursor or ():
            if place == at:
                return value
        raise ImageError("the file has no image here any more, or cannot be read up to here")

    def close(self) -> None:
        """Close what is open."""
        if self._cursor is not None:
            self._cursor.close()
        self._key, self._cursor = (), None


def _cells(path: Path, group: int, column: str) -> Generator[tuple[int, Any], None, None]:
    """Number and value of each cell, a few at a time: a group may be large."""
    batches = parquet_file(path).iter_batches(8, row_groups=[group], columns=[column])
    cells = (cell for batch in batches for cell in batch.column(0))
    for index, cell in enumerate(cells):
        yield index, cell.as_py()
