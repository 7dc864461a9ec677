"""The result document: its published schema, writing that cannot tear, reading that refuses."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from molmo_edge.bench import document, store
from molmo_edge.bench.document import Document, Row, Sample, Scenario
from molmo_edge.errors import BenchmarkError

ROOT = Path(__file__).parents[2]


def example() -> Document:
    row = Row(name="a", title="A", samples=[Sample(iteration=0, ttft_s=0.123456789)])
    return Document(
        created="2026-01-02T03:04:05+00:00",
        scenarios=[Scenario(name="report", title="R", rows=[row])],
    )


def published() -> dict[str, Any]:
    text = resources.files("molmo_edge.bench").joinpath("data", "result.schema.json").read_text()
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def test_the_published_schema_is_the_one_the_models_have() -> None:
    assert published() == document.schema()


def test_documents_fit_the_published_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(published())
    jsonschema.validate(json.loads(store.dumps(example())), published())


def test_the_schema_refuses_what_is_not_in_it() -> None:
    data = json.loads(store.dumps(example()))
    data["speed"] = 3
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, published())


def test_the_historic_results_fit_the_schema_and_load() -> None:
    paths = sorted((ROOT / "benchmarks" / "results").glob("2025-12-08-*.json"))
    assert len(paths) == 2
    for path in paths:
        jsonschema.validate(json.loads(path.read_text()), published())
        assert store.load(path).kind == "historic"


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "r.json"
    store.write(example(), path)
    again = store.load(path)
    assert again.scenarios[0].rows[0].samples[0].ttft_s == 0.123457
    assert [item.name for item in path.parent.iterdir()] == ["r.json"]


def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.json"
    path.write_text("old")

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(BenchmarkError, match="No space left"):
        store.write(example(), path)
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["r.json"]


def test_a_place_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchmarkError, match="--output"):
        store.write(example(), tmp_path / "file" / "r.json")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("no json", "not a JSON document"),
        ("[]", "not a benchmark result"),
        ('{"format": "llama-bench"}', "not a benchmark result"),
        ('{"format": "molmo-edge-bench", "version": 7}', "version 7"),
        ('{"format": "molmo-edge-bench", "version": 1}', "created"),
        (
            '{"format": "molmo-edge-bench", "version": 1, "created": "x", "scenarios": '
            '[{"name": "a", "title": "b", "rows": [{"name": 3, "title": "t"}]}]}',
            r"scenarios\.0\.rows\.0\.name",
        ),
    ],
)
def test_foreign_old_and_broken_files_are_refused_by_name(
    tmp_path: Path, text: str, says: str
) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(BenchmarkError, match=says) as caught:
        store.load(path)
    assert "r.json" in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="cannot read"):
        store.load(tmp_path / "none.json")


def test_infinities_never_reach_a_document() -> None:
    with pytest.raises(ValueError, match="finite"):
        Sample(iteration=0, ttft_s=float("inf"))
