"""`Labeler` on a Ray cluster: Ray Data streams the rows, places the actors and does lost work anew.

A cluster that ``RAY_ADDRESS`` names is joined; otherwise one is started on this machine.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

from molmo_edge.errors import ConfigError, EngineError, MissingDependencyError
from molmo_edge.label.labeler import Labeler
from molmo_edge.label.sources import Row, pyarrow
from molmo_edge.label.tasks import Task

# Rows that an actor gets at once: many, as an engine idles at the end of each batch.
BATCH_ROWS = 64


def check(engines: int) -> None:
    """Raise MissingDependencyError without Ray, ConfigError for no engines."""
    if engines < 1:
        raise ConfigError("engines must be at least 1.")
    try:
        import ray.data  # noqa: F401
    except ImportError as exc:
        raise MissingDependencyError('A cluster needs Ray: pip install "molmo-edge[ray]".') from exc


def answers(
    rows: Iterator[Row],
    tasks: Sequence[Task],
    engine: Mapping[str, Any],
    engines: int,
    options: Mapping[str, Any],
) -> Generator[dict[str, Any], None, None]:
    """Answer with `engines` actors; rows in order. Raises EngineError for what Ray gives up on."""
    import ray

    pa = pyarrow()
    listed = [(row, os.fsencode(path), at) for row, path, at in rows]
    table = pa.table(dict(zip(Row._fields, zip(*listed, strict=True), strict=True)))
    if started := not ray.is_initialized():
        # Ray's reading tasks need CPUs beside those of the actors.
        own = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": (os.cpu_count() or 1) + engines}
        ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.WARNING, **own)
    context = ray.data.DataContext.get_current()
    before = context.execution_options.preserve_order, context.enable_progress_bars
    context.execution_options.preserve_order, context.enable_progress_bars = True, False
    device = {"num_gpus": 1} if ray.cluster_resources().get("GPU") else {"num_cpus": 1}
    batches = [table.slice(i, BATCH_ROWS) for i in range(0, len(table), BATCH_ROWS)]
    answered = ray.data.from_arrow(batches).map_batches(
        Labeler,
        fn_constructor_args=([task.model_dump(exclude_defaults=True) for task in tasks],),
        fn_constructor_kwargs={"engine": dict(engine), **options},
        batch_format="pyarrow",
        batch_size=BATCH_ROWS,
        compute=ray.data.ActorPoolStrategy(size=engines),
        **device,
    )
    try:
        for batch in answered.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from batch.to_pylist()
    except ray.exceptions.RayError as exc:
        cause = getattr(exc, "cause", None) or exc
        raise EngineError(f"Ray gave up on a batch: {type(cause).__name__}: {cause}") from exc
    finally:
        context.execution_options.preserve_order, context.enable_progress_bars = before
        if started:
            ray.shutdown()
