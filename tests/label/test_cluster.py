"""The same table through Ray, with two actors, one of which is killed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from molmo_edge.engine.fake import FakeEngine
from molmo_edge.errors import ConfigError, MissingDependencyError
from molmo_edge.label import Progress, Source, label

from .conftest import shown


def slow_engine() -> FakeEngine:
    return FakeEngine.factory(shown, step_s=0.01)()


@pytest.mark.slow
def test_an_actor_that_is_killed_costs_nothing(
    folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))  # Ray's workers import this
    source = Source([str(folder(400, broken=(7,)))])
    tasks = [{"name": "what", "ask": "What is it?"}, {"count": "cups"}]
    engine = {"engine": slow_engine}
    killed: list[int] = []

    def kill(state: Progress) -> None:
        for process in [] if killed else psutil.Process().children(recursive=True):
            with suppress(psutil.Error):  # it ended meanwhile
                if "MapWorker" in " ".join(process.cmdline()):
                    process.kill()
                    killed.append(process.pid)
                    return

    label(source, tmp_path / "one", tasks, engine=engine)
    done = label(source, tmp_path / "two", tasks, engine=engine, ray=True, engines=2, progress=kill)
    assert killed and (done.done, done.errors) == (400, 1)
    same = [pq.read_table(tmp_path / name).drop_columns(["seconds"]) for name in ("one", "two")]
    assert same[0].equals(same[1])
    assert label(source, tmp_path / "two", tasks, engine=engine, ray=True, engines=2).before == 400


def test_ray_is_asked_for_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, folder: Callable[..., Path], tmp_path: Path
) -> None:
    run: dict[str, Any] = {"source": Source([str(folder(1))]), "directory": tmp_path / "out"}
    run["tasks"] = [{"caption": "short"}]
    with pytest.raises(ConfigError, match="at least 1"):
        label(**run, ray=True, engines=0)
    monkeypatch.setitem(__import__("sys").modules, "ray.data", None)
    with pytest.raises(MissingDependencyError, match=r"molmo-edge\[ray\]"):
        label(**run, ray=True)
