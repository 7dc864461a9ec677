"""The result document: its published schema, atomic writing, and reading that refuses."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from molmo_edge.bench import document
from molmo_edge.bench.document import Document, Part, Sample
from molmo_edge.bench.drift import DriftDocument
from molmo_edge.errors import BenchmarkError
from tests.bench.double import DoubleVLM, measure

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def published(name: str = "result") -> dict[str, Any]:
    data = resources.files("molmo_edge.bench").joinpath("data", f"{name}.schema.json").read_text()
    loaded: dict[str, Any] = json.loads(data)
    return loaded


@pytest.mark.parametrize(("name", "model"), [("result", Document), ("drift", DriftDocument)])
def test_the_published_schemas_are_those_of_the_models(name: str, model: type[Part]) -> None:
    assert published(name) == document.schema(model)
    jsonschema.Draft202012Validator.check_schema(published(name))


def test_recorded_results_of_older_versions_too_fit_the_schema_and_load() -> None:
    kinds = {}
    for path in RESULTS.glob("20*.json"):
        jsonschema.validate(json.loads(path.read_text()), published())
        kinds[path.name] = document.load(path).kind
    assert kinds["2025-12-08-rtx5080.json"] == kinds["2025-12-08-thor.json"] == "historic"
    assert "measured" in kinds.values()


def test_a_document_reads_back_as_written(tmp_path: Path) -> None:
    path, result = tmp_path / "new" / "r.json", measure(DoubleVLM())
    result.scenarios[0].rows[0].samples[0].ttft_s = 0.123456789
    document.save(result, "page", path)
    jsonschema.validate(json.loads(path.read_text()), published())
    loaded = document.load(path)
    assert loaded.scenarios[0].rows[0].samples[0].ttft_s == 0.123457
    assert document.dumps(loaded) == document.dumps(result)
    assert sorted(item.name for item in path.parent.iterdir()) == ["r.json", "r.md"]


def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.json"
    path.write_text("old")
    with pytest.raises(BenchmarkError, match="--output"):
        document.write("new", path / "below-a-file.json")

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(BenchmarkError, match="No space left"):
        document.write("new", path)
    assert path.read_text() == "old" and [item.name for item in tmp_path.iterdir()] == ["r.json"]


def test_results_stay_in_the_output_directory(tmp_path: Path) -> None:
    assert document.result_path(tmp_path, "../../etc/pass wd").parent == tmp_path
    assert document.result_path(tmp_path, "///").name.endswith("-result.json")
    assert document.result_path(tmp_path / "mine.json", "x") == tmp_path / "mine.json"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "cannot read"),
        ("no json", "Invalid JSON"),
        ("[]", "at the top"),
        ('{"format": "llama-bench"}', "at format"),
        ('{"version": 7}', "at version"),
        ("{}", "at created"),
        ('{"created": "x", "scenarios": [{"name": 3, "title": "t"}]}', r"at scenarios\.0\.name"),
    ],
)
def test_foreign_old_and_broken_files_are_refused_by_name(
    tmp_path: Path, text: str | None, reason: str
) -> None:
    path = tmp_path / "r.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BenchmarkError, match=reason) as caught:
        document.load(path)
    assert "r.json" in str(caught.value)


def test_infinities_never_reach_a_document() -> None:
    with pytest.raises(ValueError, match="finite"):
        Sample(iteration=0, ttft_s=float("inf"))
