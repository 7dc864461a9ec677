"""`Labeler`: the same questions about many images, as a callable on a batch of rows."""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import closing, suppress
from typing import Any, Unpack

import numpy as np
from blake3 import blake3
from PIL import Image

from molmo_edge.errors import (
    ConfigError,
    EngineDeadError,
    EngineError,
    InputError,
    MolmoEdgeError,
)
from molmo_edge.images import ImageLike, ImageLimits, load
from molmo_edge.label.sources import Limits, Reader, Row, pyarrow
from molmo_edge.label.tasks import FIXED, Task, read_tasks
from molmo_edge.points import CountResult, PointResult
from molmo_edge.requests import Options, Request
from molmo_edge.vlm import EdgeVLM

AHEAD_BYTES = 256 * 2**20  # of images that are read before the engine has room for them


class Labeler:
    """Asks the same tasks about every image.

    ``labeler(batch)`` answers one batch, so that Ray Data can run it:
    ``dataset.map_batches(Labeler, fn_constructor_args=(tasks,), batch_format="pyarrow", …)``.

    Args:
        tasks: each a `Task` or its arguments as a mapping.
        engine: an open `EdgeVLM`; or its keyword arguments, and it is started here. With several
            tasks that one keeps prompts' beginnings in the KV cache: each image is computed once.
        options: of every request, see `Options`.

    Raises:
        ConfigError: a task is wrong, or the model cannot do it.
        SamplingError, MissingDependencyError; what `EdgeVLM` raises.
    """

    def __init__(
        self,
        tasks: Sequence[Task | Mapping[str, Any]],
        engine: EdgeVLM | Mapping[str, Any] | None = None,
        **options: Unpack[Options],
    ) -> None:
        self.tasks = read_tasks(tasks)
        self.options = options
        self.schema = columns(self.tasks)
        for task in self.tasks:
            task.check(options)
        own = engine if isinstance(engine, EdgeVLM) else None
        if not isinstance(engine, EdgeVLM):
            shared = {"enable_prefix_caching": True} if len(self.tasks) > 1 else {}
            engine = EdgeVLM(**{**shared, **(engine or {})})
        self.vlm = engine
        try:
            for task in self.tasks:
                verb = "query" if task.verb == "ask" else task.verb
                if not engine.supports(verb):
                    raise ConfigError(f"Task {task.name}: this model does not support {verb}.")
                # Else every row would fail: special tokens, text beyond the context.
                try:
                    engine.check(task.request(Image.new("RGB", (64, 64)), options))
                except InputError as exc:
                    raise ConfigError(f"Task {task.name}: {exc}") from exc
        except BaseException:
            if own is None:
                engine.close()
            raise
        self.limits = Limits.of(self.vlm.settings)

    def __call__(self, batch: Any) -> Any:
        """Return a pyarrow table of the batch's columns and the answers, row by row.

        Args:
            batch: a pyarrow table, a pandas DataFrame or a mapping of columns, with images in
                ``image`` (whatever ``images.load`` takes; what Hugging Face datasets have), or with
                the columns of `Row` in its place. Other columns are kept.

        Raises:
            ConfigError: no such column, or one that has the name of one of the answers'.
            EngineError: the engine failed, and again after a restart; no row is to blame.
        """
        pa = pyarrow()
        images: Iterable[Any] | None = None
        if isinstance(batch, Mapping):
            images = batch.get("image")
            batch = {name: values for name, values in batch.items() if name != "image"}
        try:
            table = batch if isinstance(batch, pa.Table) else _as_table(batch)
        except Exception as exc:  # pyarrow has a dozen
            raise ConfigError(
                "A batch is a pyarrow table, or columns that pyarrow can keep; the chained error "
                "says which it cannot."
            ) from exc
        if "image" in table.column_names:
            images, table = table["image"].to_pylist(), table.drop_columns(["image"])
        elif images is None and {"row", "path", "at"} <= set(table.column_names):
            places = [table[name].to_pylist() for name in ("row", "path", "at")]
            rows = [Row(row, os.fsdecode(path), at) for row, path, at in zip(*places, strict=True)]
            images = _Read(rows, self.limits)
            table = table.drop_columns(["path", "at"])
        if images is None:
            raise ConfigError("A batch has its images in a column image.")
        if isinstance(images, Sized) and table.num_columns and len(images) != len(table):
            raise ConfigError("The batch's columns differ in length.")
        fields = [field for field in self.schema if field.name != "row"]
        if twice := [field.name for field in fields if field.name in table.column_names]:
            raise ConfigError(f"The batch has columns of the answers' names: {', '.join(twice)}.")
        try:
            answers = list(self.answers(map(_unpacked, images)))
        except EngineDeadError:
            self.vlm.restart()
            answers = list(self.answers(map(_unpacked, images)))
        for field in fields:
            column = pa.array([one[field.name] for one in answers], field.type)
            table = table.append_column(field, column)
        return table

    def answers(
        self, images: Iterable[ImageLike | MolmoEdgeError]
    ) -> Generator[dict[str, Any], None, None]:
        """Answer about each image in order; yields the values of the columns but ``row``.

        An image may be the error that stands in its place. Images are prepared while others are
        answered, in this thread, as `EdgeVLM.iter_batch` does. Raises EngineError.
        """
        asked: dict[int, tuple[_Answers, Task]] = {}
        waiting: deque[_Answers] = deque()

        def requests() -> Iterator[Request[Any]]:
            number = 0
            for image in images:
                answers = _Answers(self.tasks, image)
                waiting.append(answers)
                loaded = answers.load(self.limits.image)
                # Without an image one is asked nevertheless, and fails: so the row comes out.
                for task in self.tasks if loaded is not None else self.tasks[:1]:
                    asked[number] = answers, task
                    number += 1
                    yield task.request(b"" if loaded is None else loaded, self.options)

        with closing(self.vlm.iter_batch(requests())) as finished:
            for index, answer in finished:
                answers, task = asked.pop(index)
                answers.add(task, answer)
                while waiting and waiting[0].complete:
                    yield waiting.popleft().values


class _Read:
    """The images of rows, read anew for each who iterates."""

    def __init__(self, rows: Sequence[Row], limits: Limits) -> None:
        self._rows, self._limits = rows, limits

    def __iter__(self) -> Iterator[Any]:
        return (image for _, image in read_ahead(self._rows, self._limits))


class _Answers:
    """Those about one image."""

    def __init__(self, tasks: Sequence[Task], image: ImageLike | MolmoEdgeError) -> None:
        self._image: Any = image
        self._left = len(tasks)
        self._size = (0, 0)
        self.values: dict[str, Any] = {
            **dict.fromkeys((*FIXED[1:], *(task.name for task in tasks))),
            "tokens": 0,
            "seconds": 0.0,
        }

    @property
    def complete(self) -> bool:
        return self._left == 0

    def load(self, limits: ImageLimits) -> Any:
        """Return the image, decoded once for all tasks, or None for one that is broken."""
        image, self._image = self._image, None
        try:
            if isinstance(image, MolmoEdgeError):
                raise image
            self.values["hash"] = content_hash(image)
            loaded = load(image, limits)
        except InputError as exc:
            self._fail(exc)
            self._left = 1
            return None
        self._size = self.values["width"], self.values["height"] = loaded.size
        return loaded

    def add(self, task: Task, answer: Any) -> None:
        self._left -= 1
        if isinstance(answer, EngineError):
            raise answer
        if isinstance(answer, MolmoEdgeError):
            if self._size[0]:  # else it has failed
                self._fail(answer, f"{task.name}: ")
            return
        values = self.values
        points = answer.points if isinstance(answer, CountResult) else answer
        result = points.result if isinstance(points, PointResult) else points
        assert result is not None
        values[task.name] = task.value(answer, self._size)
        values["seconds"] = max(values["seconds"], result.metrics.e2e_s or 0.0)
        if (reason := getattr(result, "finish_reason", None)) is not None:
            values["tokens"] += result.metrics.output_tokens
            cut = "length" in (reason, values["finish_reason"])
            values["finish_reason"] = "length" if cut else reason

    def _fail(self, error: MolmoEdgeError, where: str = "") -> None:
        if self.values["error"] is None:
            # A table has no chain of errors.
            text = str(error).replace("; the cause is chained to this error", "")
            self.values["error"] = f"{where}{type(error).__name__}: {text}"


def _as_table(batch: Any) -> Any:
    pa = pyarrow()
    if isinstance(batch, Mapping):  # of arrays with any number of dimensions, too
        return pa.table({str(name): pa.array(list(values)) for name, values in batch.items()})
    return pa.table(batch)


def _unpacked(image: Any) -> Any:
    """The image of a struct of bytes and path, and of every other form itself."""
    if isinstance(image, Mapping):
        return image.get("bytes") or image.get("path") or b""
    return image


def columns(tasks: Sequence[Task]) -> Any:
    """The pyarrow schema of the answers to `tasks`."""
    pa = pyarrow()
    return pa.schema(
        [
            ("row", pa.string()),
            ("hash", pa.string()),
            ("width", pa.int32()),
            ("height", pa.int32()),
            *((task.name, task.type()) for task in tasks),
            ("finish_reason", pa.string()),
            ("tokens", pa.int64()),
            ("seconds", pa.float64()),
            ("error", pa.string()),
        ]
    )


def content_hash(image: Any) -> str | None:
    """BLAKE3 of an encoded image's bytes or of a frame's shape and pixels; None for other forms."""
    if isinstance(image, np.ndarray):
        return blake3(str(image.shape).encode() + image.tobytes()).hexdigest()
    if isinstance(image, str):  # a data URL
        image = image.encode(errors="surrogatepass")
    return blake3(image).hexdigest() if isinstance(image, bytes) else None


def read_ahead(rows: Iterable[Row], limits: Limits) -> Generator[tuple[Row, Any], None, None]:
    """Read the images of rows in another thread; yield each row with its image or error.

    At most `AHEAD_BYTES`, and one image more, are held for the caller.
    """
    waiting = _Ahead(AHEAD_BYTES)
    stop = threading.Event()

    def put(item: Any) -> None:
        while not stop.is_set():
            with suppress(queue.Full):
                waiting.put(item, timeout=0.2)
                return

    def work() -> None:
        reader = Reader(limits)
        try:
            for row in rows:
                if stop.is_set():
                    return
                try:
                    put((row, reader.read(row)))
                except MolmoEdgeError as exc:
                    put((row, exc))
            put(None)
        except BaseException as exc:
            put(exc)
        finally:
            reader.close()

    threading.Thread(target=work, name="molmo-edge-reader", daemon=True).start()
    try:
        while (item := waiting.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()


class _Ahead(queue.Queue[Any]):
    """A queue that counts the bytes of images in place of its items."""

    def _init(self, maxsize: int) -> None:
        self._items: deque[tuple[int, Any]] = deque()
        self._held = 0

    def _qsize(self) -> int:
        return self._held

    def _put(self, item: Any) -> None:
        image = item[1] if isinstance(item, tuple) else None
        size = 1000 + int(getattr(image, "nbytes", 0))
        size += len(image) if isinstance(image, str | bytes) else 0
        self._items.append((size, item))
        self._held += size

    def _get(self) -> Any:
        size, item = self._items.popleft()
        self._held -= size
        return item
