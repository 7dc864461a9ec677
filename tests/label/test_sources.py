"""Rows of every kind of source, and their images."""

from __future__ import annotations

import base64
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from molmo_edge.errors import ConfigError, ImageError
from molmo_edge.label.sources import Limits, Reader, Row, Source
from molmo_edge.video import VideoLimits, load_video, write_video

from .conftest import encoded


def images(rows: list[Row]) -> list[Any]:
    reader = Reader(Limits())
    return [reader.read(row) for row in rows]


def test_a_directory_is_searched_in_the_order_of_names(folder: Callable[..., Path]) -> None:
    top = folder(2)
    (top / "b").mkdir()
    (top / "b" / "9.JPG").write_bytes(encoded(9))
    for hidden in (".hidden.png", "notes.txt"):
        (top / hidden).write_bytes(encoded(0))
    rows = list(Source([str(top)]).rows())
    assert [row.row for row in rows] == ["0000.png", "0001.png", "b/9.JPG"]
    assert images(rows) == [encoded(0), encoded(1), encoded(9)]
    pattern = list(Source([f"{top}/**/*.png"]).rows())
    assert [row.row for row in pattern] == [f"{top}/0000.png", f"{top}/0001.png"]
    two = Source([f"{top}/b", f"{top}/0000.png"]).rows()
    assert [row.row for row in two] == [f"{top}/b/9.JPG", f"{top}/0000.png"]


def test_names_that_are_no_text_are_rows_too(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")).write_bytes(encoded(1))
    [row] = Source([str(tmp_path)]).rows()
    assert row.row == "\\udcff.png" and images([row]) == [encoded(1)]


def test_parquet_has_paths_bytes_or_both(tmp_path: Path) -> None:
    (tmp_path / "a b.png").write_bytes(encoded(0))
    uri = (tmp_path / "a b.png").as_uri()
    tables: list[tuple[dict[str, Any], list[Any]]] = [
        ({"path": ["a b.png", uri, str(tmp_path / "a b.png")]}, [encoded(0)] * 3),
        ({"image": [encoded(1), encoded(2), encoded(3)]}, [encoded(1), encoded(2), encoded(3)]),
        ({"image": [{"bytes": encoded(i), "path": None} for i in (1, 2, 3)], "path": ["x"] * 3},
         [encoded(1), encoded(2), encoded(3)]),
    ]  # fmt: skip
    for columns, expected in tables:
        path = tmp_path / "table.parquet"
        pq.write_table(pa.table({**columns, "id": [7, 8, 9]}), path, row_group_size=2)
        rows = list(Source([str(path)]).rows())
        assert [row.row for row in rows] == [f"{path}#{i}" for i in range(3)]
        assert images(rows) == expected
        assert images(rows[::-1]) == expected[::-1]
        assert [row.row for row in Source([str(path)], id_column="id").rows()] == ["7", "8", "9"]


def test_a_row_without_an_image_is_its_own_error(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table({"path": ["none.png", None, "https://a/b.png"]}), path)
    for row in Source([str(path)]).rows():
        with pytest.raises(ImageError):
            images([row])
    pq.write_table(pa.table({"image": pa.array([None], pa.binary())}), path)
    with pytest.raises(ImageError, match="no image here"):
        images(list(Source([str(path)]).rows()))


def test_a_group_that_cannot_be_read_costs_its_own_rows(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    table = pa.table({"image": [encoded(i) for i in range(9)]})
    pq.write_table(table, path, row_group_size=3, compression="none", use_dictionary=False)
    place = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[place : place + 60] = b"\xff" * 60
    path.write_bytes(data)
    reader, seen = Reader(Limits()), []
    for row in Source([str(path)]).rows():
        try:
            seen.append(reader.read(row))
        except ImageError:
            seen.append("broken")
    good = [encoded(i) for i in (0, 1, 2, 6, 7, 8)]
    assert seen == [*good[:3], "broken", "broken", "broken", *good[3:]]


def test_a_table_of_the_users_own_forms(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(0))
    path = tmp_path / "table.parquet"
    url = f"data:image/png;base64,{base64.b64encode(encoded(1)).decode()}"
    columns: list[tuple[Any, list[Any]]] = [
        ([{"bytes": None, "path": "a.png"}, {"bytes": encoded(2), "path": None}],
         [encoded(0), encoded(2)]),
        (pa.array(["a.png", "a.png"]).dictionary_encode(), [encoded(0)] * 2),
        ([url, url.replace("data", "DATA")], [url, url.replace("data", "DATA")]),
    ]  # fmt: skip
    for column, expected in columns:
        pq.write_table(pa.table({"image": column, "id": [None, 5]}), path)
        rows = list(Source(str(path), id_column="id").rows())
        assert [row.row for row in rows] == [f"{path}#0", "5"]
        assert images(rows) == expected


@pytest.mark.parametrize(
    "entry",
    [
        {"path": "a\0b.png"},
        {"path": "\ud800.png"},
        {"path": ["a.png"]},
        {"path": "file://[::1/x"},
        {"path": "~nouser/a.png"},
        {"bytes": "é"},
        {"bytes": 5},
    ],
)
def test_a_broken_cell_is_an_error_of_its_row(entry: Any, tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    path.write_text(json.dumps(entry))
    [row] = Source([path]).rows()
    with pytest.raises(ImageError):
        images([row])


def test_json_lines_have_paths_data_urls_or_base64(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(0))
    text = base64.b64encode(encoded(1)).decode()
    path = tmp_path / "table.jsonl"
    entries = [{"file_name": "a.png"}, {"image": f"data:image/png;base64,{text}"}, {"bytes": text}]
    path.write_text("\n\n".join(map(json.dumps, entries)))
    rows = list(Source([str(path)]).rows())
    assert [row.row for row in rows] == [f"{path}#{i}" for i in (0, 2, 4)]
    assert images(rows) == [encoded(0), entries[1]["image"], encoded(1)]
    path.write_text('{"path": "a.png"}\n{"id": 2}')
    first, second = Source([str(path)]).rows()
    assert images([first]) == [encoded(0)]
    with pytest.raises(ImageError, match="no local path"):
        images([second])
    path.write_text("[]")
    with pytest.raises(ConfigError, match="line 1 is not a JSON object"):
        list(Source([str(path)]).rows())


def test_shards_have_a_row_for_each_image(tmp_path: Path) -> None:
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as file:
            for key in ("x", "y"):
                for suffix, data in ((".txt", b"caption"), (".png", encoded(shard))):
                    member = tarfile.TarInfo(f"{key}{suffix}")
                    member.size = len(data)
                    file.addfile(member, io.BytesIO(data))
    rows = list(Source([f"{tmp_path}/*.tar"]).rows())
    assert [row.row for row in rows] == [
        f"{tmp_path}/{i}.tar/{k}.png" for i in (0, 1) for k in "xy"
    ]
    assert images(rows) == [encoded(0), encoded(0), encoded(1), encoded(1)]
    assert images(rows[::-1]) == [encoded(1), encoded(1), encoded(0), encoded(0)]


@pytest.mark.parametrize("damage", ["cut", "header", "between"])
def test_a_shard_that_is_damaged_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as file:
        for key in range(5):
            member = tarfile.TarInfo(f"{key}.png")
            member.size = len(encoded(key))
            file.addfile(member, io.BytesIO(encoded(key)))
    data = bytearray(path.read_bytes())
    assert len(list(Source([path]).rows())) == 5
    if damage == "header":
        data[2048:2560] = b"\xff" * 512
    path.write_bytes(data[: {"cut": 2300, "between": 2048}.get(damage, len(data))])
    with pytest.raises(ConfigError, match=r"damaged or cut short|cannot be read"):
        list(Source([path]).rows())


def test_a_video_has_a_row_for_each_sampled_frame(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    frames = [np.full((48, 64, 3), 25 * i, np.uint8) for i in range(10)]
    write_video(path, frames, 5.0)
    rows = list(Source([str(path)], fps=2.0).rows())
    assert [row.row for row in rows] == [f"{path}#t={t:.3f}" for t in (0.0, 0.5, 1.0, 1.5)]
    seen = images(rows)
    assert [round(float(one.mean()) / 25) for one in seen] == [0, 2, 5, 7]
    for one, other in zip(images(rows[::-1]), seen[::-1], strict=True):
        assert (one == other).all()
    clip = load_video(path, VideoLimits(max_fps=2.0))  # which ends with the last frame
    for one, other in zip(clip.frames, seen, strict=False):
        assert (one == other).all()


def test_what_is_no_source_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    (tmp_path / "broken.tar").write_bytes(b"x" * 1024)
    (tmp_path / "broken.mp4").write_bytes(b"x" * 1024)
    (tmp_path / "notes.doc").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe.jsonl")
    pq.write_table(pa.table({"image": [1.5]}), tmp_path / "numbers.parquet")
    pq.write_table(pa.table({"label": ["x"]}), tmp_path / "labels.parquet")
    for name, message in (
        ("broken.parquet", "cannot be read"),
        ("pipe.jsonl", "cannot be read"),
        ("broken.tar", "cannot be read"),
        ("broken.mp4", "not an MP4"),
        ("notes.doc", "neither as an image"),
        ("none", "There is no"),
        ("none*", "Nothing matches"),
        ("numbers.parquet", "column image is of type double"),
        ("labels.parquet", "has no column image or path"),
    ):
        with pytest.raises(ConfigError, match=message):
            list(Source([str(tmp_path / name)]).rows())
    for names in ([], [""], "", [3], None):
        with pytest.raises(ConfigError, match="A source is named by"):
            Source(names)  # type: ignore[arg-type]
    for fps in (0.0, -1.0, float("nan"), 1e9):
        with pytest.raises(ConfigError, match="fps must be"):
            list(Source([str(tmp_path)], fps=fps).rows())
    with pytest.raises(ConfigError, match="fetches nothing"):
        list(Source(["s3://bucket/photos"]).rows())
    with pytest.raises(ConfigError, match="has no column key"):
        list(Source([str(tmp_path / "labels.parquet")], "label", "key").rows())
