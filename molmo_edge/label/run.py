"""`label`: from a source to a table of answers, on this machine or on a Ray cluster."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Unpack

from molmo_edge.devices.telemetry import Sampler
from molmo_edge.engine.vllm_args import versions
from molmo_edge.engine.vllm_engine import refuse_schema
from molmo_edge.errors import ConfigError, EngineDeadError, ImageError
from molmo_edge.files import expand_home
from molmo_edge.label import cluster
from molmo_edge.label.labeler import Labeler, columns, content_hash, read_ahead
from molmo_edge.label.output import Answered, Output
from molmo_edge.label.sources import Limits, Row, Source
from molmo_edge.label.tasks import Task, read_tasks
from molmo_edge.requests import Options
from molmo_edge.settings import EdgeSettings, resolve
from molmo_edge.vlm import EdgeVLM

# Settings of the engine on which answers depend.
_SETTINGS = ("model", "precision", "dtype", "kv_cache_dtype", "max_crops", "resize", "load_format",
             "seed", "engine_args")  # fmt: skip
_SENSOR_S = 5.0


@dataclass
class Progress:
    """Where a run is.

    Attributes:
        total: rows of the source.
        before: rows that earlier runs have done.
        done: rows that are done, `before` included.
        errors: rows with an error.
        seconds: since the engine was ready.
        joules: energy since then, None where no sensor is.
    """

    total: int
    before: int = 0
    done: int = 0
    errors: int = 0
    seconds: float = 0.0
    joules: float | None = None

    @property
    def rate(self) -> float | None:
        """Rows per second of this run."""
        return (self.done - self.before) / self.seconds if self.seconds else None

    @property
    def left_s(self) -> float | None:
        """Seconds to go at that rate."""
        return (self.total - self.done) / self.rate if self.rate else None

    def __str__(self) -> str:
        words = [f"{self.done:,} of {self.total:,} rows"]
        if self.rate and self.left_s is not None:
            words.append(f"{self.rate:.2f} rows/s")
            if self.done < self.total and self.done - self.before >= 20:  # before, it is a guess
                minutes, seconds = divmod(round(self.left_s), 60)
                words.append(f"{minutes // 60}:{minutes % 60:02}:{seconds:02} to go")
            if self.joules is not None:
                words.append(f"{self.joules / (self.done - self.before):.1f} J per row")
        return ", ".join([*words, f"{self.errors:,} error{'s' * (self.errors != 1)}"])


def label(
    source: Source | Sequence[str] | str,
    directory: Path | str,
    tasks: Sequence[Task | Mapping[str, Any]],
    *,
    engine: EdgeVLM | Mapping[str, Any] | None = None,
    flush_s: float = 60.0,
    flush_rows: int = 10_000,
    limit: int | None = None,
    restart: bool = False,
    dedupe: bool = False,
    ray: bool = False,
    engines: int = 1,
    progress: Callable[[Progress], object] | None = None,
    **options: Unpack[Options],
) -> Progress:
    """Ask all tasks about every image of a source; write the answers as Parquet parts.

    Goes on where an earlier call with the same arguments stopped, for whatever reason. A row whose
    image is broken, or about which a question fails, has an error in its column ``error``.

    Args:
        source: a `Source`, or its `names`.
        directory: of the parts.
        tasks: see `Labeler`.
        engine: keyword arguments of `EdgeVLM`; or an open one, which stays open.
        flush_s, flush_rows: a part is written when it is that old, or has as many rows.
        limit: label only so many of the first rows; a call without it goes on.
        restart: delete the parts that are there and begin anew.
        dedupe: answer about images of equal content once; on one machine only.
        ray: use `engines` actors of a Ray cluster, which ``RAY_ADDRESS`` names or which is started
            on this machine; one GPU each, where there are any.
        progress: called before the first row and after every row.
        options: of every request, see `Options`.

    Raises:
        ConfigError: of source, tasks or directory, before the model loads; or the disk is full.
        MissingDependencyError: pyarrow or Ray is not installed.
        EngineDeadError: the engine died twice without an answer between.
        What `EdgeVLM` raises.
    """
    if not isinstance(source, Source):
        source = Source(source)
    if not (isinstance(flush_s, int | float) and flush_s > 0 and isinstance(flush_rows, int)):
        raise ConfigError("flush_s and flush_rows are numbers above 0.")
    if flush_rows < 1 or (engines != 1 and not ray):
        raise ConfigError("flush_rows is at least 1, and engines are those of a cluster: give ray.")
    tasks = read_tasks(tasks)
    own = engine if isinstance(engine, EdgeVLM) else None
    given = {} if isinstance(engine, EdgeVLM) else dict(engine or {})
    settings = own.settings if own is not None else _settings(given)
    limits = Limits.of(settings)
    for task in tasks:
        task.check(options, settings.max_crops)
        if task.json_schema is not None and not callable(given.get("engine")):
            refuse_schema(task.json_schema)
    if ray:
        if dedupe or own is not None:
            raise ConfigError("dedupe and an open engine are for one machine, not for ray.")
        cluster.check(engines)
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ConfigError("limit is a number of rows, at least 1.")
    if not (total := sum(1 for _ in islice(source.rows(limits), limit))):
        raise ConfigError("The source has no JPEG, PNG, WebP or BMP image, and no row.")
    places = [str(expand_home(name).absolute()) for name in source.names]
    configuration = {
        "source": {**vars(source), "names": places},
        "tasks": [task.model_dump(exclude_defaults=True) for task in tasks],
        "options": {name: one for name, one in options.items() if name != "timeout"},
        "dedupe": dedupe,
        **{name: getattr(settings, name) for name in _SETTINGS},
    }
    state = Progress(total)
    with Output(
        Path(directory), columns(tasks), configuration,
        flush_s=flush_s, flush_rows=flush_rows, restart=restart,
    ) as output:  # fmt: skip
        state.before = state.done = output.done
        state.errors = output.errors
        total = state.total = max(total, output.done)
        rows = output.skip_done(islice(source.rows(limits), total))
        if state.done == total:
            return state
        if progress is not None:
            progress(state)
        output.environment = versions()
        if ray:
            answers = cluster.answers(rows, tasks, given, engines, options)
            return _collect(answers, output, state, progress)
        labeler = Labeler(tasks, given if own is None else own, **options)
        opened = labeler.vlm if own is None else nullcontext(own)
        with opened as vlm, Sampler(_SENSOR_S) as sampler:
            output.environment = {**versions(), **vlm.environment}
            answered = Answered(output.written()) if dedupe else None
            while True:
                began = output.done
                try:
                    answers = _answer(labeler, rows, answered)
                    return _collect(answers, output, state, progress, sampler)
                except EngineDeadError:
                    if output.done == began:
                        raise
                    output.flush()
                    if vlm.state == "dead":  # another thread may have seen to it
                        vlm.restart()
                    rows = output.skip_done(islice(source.rows(limits), total))


def _settings(engine: Mapping[str, Any]) -> EdgeSettings:
    arguments = {name: None if callable(one) else one for name, one in engine.items()}
    return resolve(arguments, config=arguments.pop("config", None)).settings


def _collect(
    answers: Generator[dict[str, Any], None, None],
    output: Output,
    state: Progress,
    progress: Callable[[Progress], object] | None,
    sampler: Sampler | None = None,
) -> Progress:
    """Write answers as they come. Raises ConfigError for fewer or more rows than were counted."""
    began = time.monotonic() - state.seconds
    with closing(answers):
        for row in answers:
            output.add(row)
            state.done, state.errors = output.done, output.errors
            measured, state.seconds = state.seconds, time.monotonic() - began
            if sampler is not None and int(measured / _SENSOR_S) < int(state.seconds / _SENSOR_S):
                state.joules = sampler.summary().energy_j
            if progress is not None:
                progress(state)
    if state.done != state.total:
        raise ConfigError(
            f"The source changed meanwhile: it had {state.total} rows, and {state.done} were "
            "labelled. The same call goes on if the rest was only added at its end."
        )
    return state


def _answer(
    labeler: Labeler, rows: Iterator[Row], answered: Answered | None
) -> Generator[dict[str, Any], None, None]:
    """Answer on this machine; rows in order, those equal to an earlier one from `answered`."""
    order: deque[tuple[str, str | None]] = deque()  # names, and the hashes of known images
    asked: set[str] = set()

    def images() -> Iterator[Any]:
        with closing(read_ahead(rows, labeler.limits)) as ahead:
            for row, image in ahead:
                hash = content_hash(image) if answered is not None else None
                if answered is not None and (hash in asked or answered.find(hash) is not None):
                    order.append((row.row, hash))
                    yield ImageError("answered already")  # stands for the answers, which follow
                    continue
                if hash is not None:
                    asked.add(hash)
                order.append((row.row, None))
                yield image

    with closing(labeler.answers(images())) as answers:
        for values in answers:
            name, hash = order.popleft()
            if answered is not None and hash is not None:
                known = answered.find(hash)
                assert known is not None  # the row before it, which has been answered since
                values = known
            elif answered is not None:
                answered.add(values)
                asked.discard(values["hash"])
            yield {**values, "row": name}
