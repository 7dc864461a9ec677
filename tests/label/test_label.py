"""Labelling with a fake engine: columns, errors, going on after every kind of end, duplicates."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from molmo_edge import EdgeVLM
from molmo_edge.engine.fake import FakeEngine, FakeFactory, Fault
from molmo_edge.engine.vllm_engine import refuse_schema
from molmo_edge.errors import ConfigError, EngineDeadError, EngineStartError, SamplingError
from molmo_edge.label import Labeler, Progress, Source, Task, label
from molmo_edge.label import output as parts

from .conftest import encoded, shown

ASK = [{"name": "what", "ask": "What is it?"}]


def table(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(out).to_pylist()
    return rows


def test_every_kind_of_task_has_its_typed_column(
    folder: Callable[..., Path], fake: FakeFactory, tmp_path: Path
) -> None:
    tasks: list[dict[str, Any]] = [
        {"caption": "long"},
        {"point": "Red Mug"},
        {"count": "chairs"},
        {"name": "what", "ask": "What is it?"},
        {"name": "open", "choose": "Open?", "choices": ("image 1", "image 2")},
    ]
    out = tmp_path / "out"
    done = label(Source([str(folder(3, broken=(1,)))]), out, tasks, engine={"engine": fake})
    assert (done.total, done.before, done.done, done.errors) == (3, 0, 3, 1)
    schema = pq.read_schema(out / "part-000000.parquet")
    place = "list<element: struct<x: double, y: double, column: int32, row: int32>>"
    assert [str(schema.field(name).type) for name in ("caption", "count_chairs")] == [
        "string",
        "int64",
    ]
    assert str(schema.field("point_red_mug").type) == place
    first, broken, last = table(out)
    assert last["row"] == "0002.png" and (last["width"], last["height"]) == (64, 48)
    assert last["caption"] == last["what"] == "image 2"
    assert last["point_red_mug"] == [{"x": 0.5, "y": 0.25, "column": 32, "row": 12}]
    assert (first["count_chairs"], last["count_chairs"]) == (0, 2)
    assert last["open"]["choice"] == "image 2"
    assert sum(last["open"]["probabilities"].values()) == pytest.approx(1)
    assert last["finish_reason"] == "stop" and last["tokens"] > 8 and last["seconds"] > 0
    assert last["error"] is None and len(last["hash"]) == 64
    assert broken["error"].startswith("ImageError: ") and broken["caption"] is None
    about = json.loads(schema.metadata[b"molmo_edge"])
    assert about["configuration"]["model"] == "demo" and "molmo_edge" in about["environment"]


def test_one_question_that_fails_leaves_the_answers_to_the_others(
    folder: Callable[..., Path], tmp_path: Path
) -> None:
    def answer(turns: Any) -> str:
        if turns[-1].text == "What is it?" and np.asarray(turns[-1].images[0])[0, 0, 2] == 7:
            raise RuntimeError("broken")
        return "There are 4 cups."

    engine = FakeEngine.factory(answer)
    tasks = [*ASK, {"count": "cups"}]
    done = label(Source([str(folder(2))]), tmp_path / "out", tasks, engine={"engine": engine})
    assert done.errors == 2
    for row in table(tmp_path / "out"):
        assert row["count_cups"] == 4 and row["what"] is None
        assert row["error"].startswith("what: GenerationError: ")


def test_the_same_call_goes_on_and_another_is_refused(
    folder: Callable[..., Path], fake: FakeFactory, tmp_path: Path
) -> None:
    source, out = Source([str(folder(10))]), tmp_path / "out"
    stop = mock.Mock(side_effect=[None] * 7 + [KeyboardInterrupt])
    run: dict[str, Any] = {"engine": {"engine": fake}, "flush_rows": 4}
    with pytest.raises(KeyboardInterrupt):
        label(source, out, ASK, progress=stop, **run)
    assert len(table(out)) == 7  # what was answered is kept
    assert label(source, out, ASK, **run).before == 7
    rows = table(out)
    assert [row["what"] for row in rows] == [f"image {i}" for i in range(10)]
    engines = len(fake.engines)
    done = label(source, out, ASK, **run)
    assert (done.before, done.done) == (10, 10) and len(fake.engines) == engines
    for changed in (
        {"tasks": [{"name": "what", "ask": "What else?"}]},
        {"engine": {"engine": fake, "model": "stub"}},
        {"dedupe": True},
        {"max_tokens": 3},
    ):
        with pytest.raises(ConfigError, match="was begun with"):
            label(**{"source": source, "directory": out, "tasks": ASK, **run, **changed})
    with pytest.raises(ConfigError, match="was begun with source: "):
        label(Source([f"{source.names[0]}/*"]), out, ASK, **run)
    assert table(out) == rows
    label(source, out, [{"count": "cups"}], restart=True, **run)
    assert "what" not in table(out)[0]


def test_a_trial_of_the_first_rows_goes_on(
    folder: Callable[..., Path], fake: FakeFactory, tmp_path: Path
) -> None:
    run: dict[str, Any] = {"source": [str(folder(9))], "directory": tmp_path / "out", "tasks": ASK}
    run |= {"engine": {"engine": fake}}
    assert label(**run, limit=3).done == 3
    assert label(**run, limit=2).done == 3
    assert label(**run).before == 3
    assert [row["row"] for row in table(tmp_path / "out")] == [f"{i:04}.png" for i in range(9)]


def test_a_source_that_has_changed_is_refused(
    folder: Callable[..., Path], fake: FakeFactory, tmp_path: Path
) -> None:
    top, out = folder(4), tmp_path / "out"
    run: dict[str, Any] = {"engine": {"engine": fake}}
    label(Source([str(top)]), out, ASK, **run)
    (top / "9.png").write_bytes(encoded(9))  # a new row at the end is only a new row
    assert label(Source([str(top)]), out, ASK, **run).done == 5
    (top / "0002.png").rename(top / "0002b.png")
    with pytest.raises(ConfigError, match="The source has changed"):
        label(Source([str(top)]), out, ASK, **run)
    (top / "0002b.png").unlink()
    (top / "9.png").unlink()
    with pytest.raises(ConfigError, match="The source has changed"):
        label(Source([str(top)]), out, ASK, **run)


def test_a_directory_of_something_else_and_a_lost_part_are_refused(
    folder: Callable[..., Path], fake: FakeFactory, tmp_path: Path
) -> None:
    source, out = Source([str(folder(4))]), tmp_path / "out"
    run: dict[str, Any] = {"engine": {"engine": fake}, "flush_rows": 2}
    out.mkdir()
    for name in ("notes.txt", "part-000000.parquet"):
        pq.write_table(pa.table({"x": [1]}), out / name)
        with pytest.raises(ConfigError, match=f"files of something else, such as {name}"):
            label(source, out, ASK, **run)
        (out / name).unlink()
    label(source, out, ASK, **run)
    (out / "part-000000.parquet").unlink()
    with pytest.raises(ConfigError, match=r"A part before .*part-000001.parquet' is missing"):
        label(source, out, ASK, **run)


def test_a_table_that_was_written_anew_is_refused(fake: FakeFactory, tmp_path: Path) -> None:
    path, out = tmp_path / "table.parquet", tmp_path / "out"
    for images in ([1, 2, 3], [0, 1, 2, 3, 4]):
        pq.write_table(pa.table({"image": [encoded(i) for i in images]}), path)
        if len(images) == 3:
            label([str(path)], out, ASK, engine={"engine": fake})
    with pytest.raises(ConfigError, match="The source has changed"):
        label([str(path)], out, ASK, engine={"engine": fake})


def test_a_source_that_changes_meanwhile_is_an_error(
    folder: Callable[..., Path], fake: FakeFactory, tmp_path: Path
) -> None:
    top = folder(30)

    def remove(state: Progress) -> None:
        if not state.done:
            for i in range(20, 30):
                (top / f"{i:04}.png").unlink()

    with pytest.raises(ConfigError, match="changed meanwhile: it had 30 rows, and 20 were"):
        label([str(top)], tmp_path / "out", ASK, engine={"engine": fake}, progress=remove)


def test_a_new_beginning_deletes_nothing_before_it_has_answers(
    folder: Callable[..., Path], fake: FakeFactory, tmp_path: Path
) -> None:
    source, out = Source([str(folder(6))]), tmp_path / "out"
    label(source, out, ASK, engine={"engine": fake}, flush_rows=2)
    broken = FakeEngine.factory(shown, faults=[Fault("build", RuntimeError("no memory"))])
    with pytest.raises(EngineStartError):
        label(source, out, ASK, engine={"engine": broken}, restart=True)
    assert len(table(out)) == 6
    (out / "part-000001.parquet").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"part-000001.parquet' is no whole Parquet file"):
        label(source, out, ASK, engine={"engine": fake})
    pq.write_table(pa.table({"x": [1]}), out / "part-mine.parquet")
    with pytest.raises(ConfigError, match=r"something else, such as part-mine.parquet"):
        label(source, out, ASK, engine={"engine": fake}, restart=True)
    (out / "part-mine.parquet").unlink()
    label(source, out, ASK, engine={"engine": fake}, restart=True)
    assert len(table(out)) == 6 and len(list(out.glob("part-*"))) == 1


def test_a_part_of_another_number_is_refused_and_never_written_over(
    folder: Callable[..., Path], fake: FakeFactory, tmp_path: Path
) -> None:
    top, out = folder(4), tmp_path / "out"
    label([str(top)], out, ASK, engine={"engine": fake}, flush_rows=2)
    (out / "part-000001.parquet").rename(out / "part-000002.parquet")
    with pytest.raises(ConfigError, match="is missing"):
        label([str(top)], out, ASK, engine={"engine": fake})


def test_two_processes_do_not_write_to_one_directory(
    folder: Callable[..., Path], fake: FakeFactory, tmp_path: Path
) -> None:
    source = Source([str(folder(2))])

    def again(_: Progress) -> None:
        with pytest.raises(ConfigError, match="Another process is writing"):
            label(source, tmp_path / "out", ASK, engine={"engine": fake})

    assert label(source, tmp_path / "out", ASK, engine={"engine": fake}, progress=again).done == 2


def test_ten_kills_lose_and_repeat_nothing(folder: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = f"""
        import os, signal, sys
        from molmo_edge.engine.fake import FakeEngine
        from molmo_edge.label import Source, label
        from tests.label.conftest import shown
        def progress(state):
            if state.done - state.before == ROWS:
                os.kill(os.getpid(), signal.SIGKILL)
        label(Source([{str(folder(60, broken=(3, 40)))!r}]), {str(out)!r}, {ASK!r},
              flush_rows=2, engine={{"engine": FakeEngine.factory(shown)}},
              progress=progress)
    """
    kills = 0
    for rows in (1, 2, 3, 5, 6, 7, 8, 9, 10, 11, -1):
        code = textwrap.dedent(script).replace("ROWS", str(rows))
        ended = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
        kills += ended.returncode == -signal.SIGKILL
    assert ended.returncode == 0 and kills == 10
    rows = table(out)
    assert [row["row"] for row in rows] == [f"{i:04}.png" for i in range(60)]
    assert [i for i, row in enumerate(rows) if row["error"]] == [3, 40]
    assert all(row["what"] == f"image {i}" for i, row in enumerate(rows) if i not in (3, 40))


def test_a_full_disk_ends_the_run_and_leaves_whole_parts(
    folder: Callable[..., Path], fake: FakeFactory, tmp_path: Path
) -> None:
    source, out = Source([str(folder(6))]), tmp_path / "out"
    run: dict[str, Any] = {"engine": {"engine": fake}, "flush_rows": 2}
    real, calls = os.fsync, iter(range(100))

    def full(descriptor: int) -> None:
        if next(calls):
            raise OSError(28, "No space left on device")
        real(descriptor)

    with (
        mock.patch.object(parts.os, "fsync", full),
        pytest.raises(ConfigError, match="cannot be written: No space left on device"),
    ):
        label(source, out, ASK, **run)
    assert len(table(out)) == 2 and len(list(out.glob("part-*"))) == 1
    assert label(source, out, ASK, **run).before == 2
    assert len(table(out)) == 6
    with (
        mock.patch.object(parts.shutil, "disk_usage", return_value=mock.Mock(free=1000)),
        pytest.raises(ConfigError, match="No space left"),
    ):
        label(source, tmp_path / "other", ASK, **run)


def test_an_engine_that_dies_is_started_again_unless_it_dies_at_once(
    folder: Callable[..., Path], tmp_path: Path
) -> None:
    source = Source([str(folder(120))])
    once = FakeEngine.factory(shown, faults=[Fault("step", RuntimeError("broken"), 12)])
    assert label(source, tmp_path / "once", ASK, engine={"engine": once}).done == 120
    rows = table(tmp_path / "once")
    assert [row["what"] for row in rows] == [f"image {i}" for i in range(120)]
    assert len(once.engines) == 2
    always = FakeEngine.factory(shown, faults=[Fault("step", RuntimeError("broken"))])
    with pytest.raises(EngineDeadError):
        label(source, tmp_path / "always", ASK, engine={"engine": always})


def test_equal_images_are_answered_once(tmp_path: Path, fake: FakeFactory) -> None:
    top, out = tmp_path / "photos", tmp_path / "out"
    top.mkdir()
    for i in range(30):
        (top / f"{i:02}.png").write_bytes(b"none" if i % 5 == 4 else encoded(i % 5))
    run: dict[str, Any] = {"engine": {"engine": fake}, "dedupe": True, "flush_rows": 7}
    stop = mock.Mock(side_effect=[None] * 12 + [KeyboardInterrupt])
    with pytest.raises(KeyboardInterrupt):
        label(Source([str(top)]), out, ASK, progress=stop, **run)
    label(Source([str(top)]), out, ASK, **run)
    assert sum(len(engine.added) for engine in fake.engines) == 4
    rows = table(out)
    assert [row["row"] for row in rows] == [f"{i:02}.png" for i in range(30)]
    for i, row in enumerate(rows):
        assert row["what"] == (None if i % 5 == 4 else f"image {i % 5}")
        assert (row["error"] is not None) == (i % 5 == 4)
        assert (row["tokens"] > 0) == (i < 4)


def test_what_cannot_be_used_is_refused_before_the_engine_starts(
    folder: Callable[..., Path], fake: FakeFactory, tmp_path: Path
) -> None:
    def refused(error: type[Exception], match: str, **changed: Any) -> None:
        given = {"source": Source([str(folder_of_one)]), "directory": tmp_path / "out"}
        with pytest.raises(error, match=match):
            label(**{**given, "tasks": ASK, "engine": {"engine": fake}, **changed})
        assert not fake.engines

    folder_of_one = folder(1)
    (tmp_path / "empty").mkdir()
    refused(ConfigError, "no JPEG, PNG", source=Source([str(tmp_path / "empty")]))
    refused(ConfigError, "nothing to ask", tasks=[])
    refused(ConfigError, "would have the name what", tasks=ASK * 2)
    refused(ConfigError, "would have the name error", tasks=[{"name": "error", "ask": "x"}])
    refused(ConfigError, "Task 1: .*exactly one of", tasks=[{"ask": "x", "count": "y"}])
    refused(ConfigError, "Task 1: .*choices", tasks=[{"ask": "x", "choices": ["a", "b"]}])
    refused(ConfigError, "Two choices are equal", tasks=[{"choose": "x", "choices": ["a", "a"]}])
    refused(ConfigError, "Task point: .*label is empty", tasks=[{"point": " "}])
    refused(ConfigError, "question is empty", tasks=[{"name": "x", "ask": " "}])
    refused(ConfigError, "temperature", temperature=-1.0)
    refused(ConfigError, "max_crops must be at most 3", max_crops=4,
            engine={"engine": fake, "max_crops": 3})  # fmt: skip
    refused(ConfigError, "no text", tasks=[{"name": "\ud800", "ask": "x"}])
    refused(ConfigError, "flush_s and", flush_s="x")
    refused(ConfigError, "flush_rows is at least", flush_rows=0)
    refused(ConfigError, "engines are those", engines=2)
    refused(
        ConfigError,
        "Task 1: choise is unknown. Did you mean choose",
        tasks=[{"ask": "x", "choise": "red"}],
    )
    schema = {"ask": "x", "json_schema": {"type": "nonsense"}}
    refused(SamplingError, "json_schema", tasks=[schema], engine={"model": "stub"})
    refuse_schema({"type": "integer", "multipleOf": 5})  # which the default backend can
    (tmp_path / "file").write_text("")
    refused(ConfigError, "cannot be written", directory=tmp_path / "file")
    refused(ConfigError, "dedupe and an open engine", ray=True, dedupe=True)
    with mock.patch.dict(sys.modules, {"pyarrow": None}):
        refused(ImportError, r"molmo-edge\[label\]")


def test_a_labeler_answers_a_batch_of_columns_and_keeps_the_others(fake: FakeFactory) -> None:
    labeler = Labeler([Task(name="what", ask="What is it?")], {"engine": fake})
    images = [np.full((48, 64, 3), i, np.uint8) for i in range(3)]
    batch = {"image": np.stack(images), "key": np.arange(3)}
    answered = labeler(batch)
    assert answered["key"].to_pylist() == [0, 1, 2]
    assert answered["what"].to_pylist() == ["image 0", "image 257", "image 514"]
    again = labeler(pa.table({"image": [encoded(1), b""]}))
    assert again["what"].to_pylist() == ["image 1", None]
    assert again["error"].to_pylist()[0] is None and again["error"].to_pylist()[1]
    with pytest.raises(ConfigError, match="the answers' names: what"):
        labeler({"image": images, "what": [1, 2, 3]})
    kinds = {"small": pa.int8(), "word": pa.dictionary(pa.int32(), pa.string())}
    kept = pa.table({"image": [{"bytes": encoded(2), "path": None}]}).append_column(
        "small", pa.array([1], kinds["small"])
    )
    kept = kept.append_column("word", pa.array(["a"]).dictionary_encode())
    same = labeler(kept)
    assert {name: same.schema.field(name).type for name in kinds} == kinds
    assert same["what"].to_pylist() == ["image 2"]
    assert labeler(kept.to_pandas())["what"].to_pylist() == ["image 2"]
    for wrong in (None, [1], {"image": images, "x": [1]}, {"image": images, "x": [object()] * 3}):
        with pytest.raises(ConfigError):
            labeler(wrong)
    with pytest.raises(ConfigError, match="a column image"):
        labeler({"picture": [1, 2, 3]})
    labeler.vlm.close()


def test_a_labeler_on_an_engine_of_the_users_own(fake: FakeFactory) -> None:
    with EdgeVLM(engine=fake) as vlm:
        labeler = Labeler([{"count": "cups"}], vlm, max_tokens=20)

        def endless() -> Iterator[bytes]:
            for i in range(10**9):
                yield encoded(i % 100)

        answers = labeler.answers(endless())
        assert [next(answers)["count_cups"] for _ in range(50)] == list(range(50))
        answers.close()
        assert vlm.query(None, "Hello?").text  # nothing of it is left in the engine
