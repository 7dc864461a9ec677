"""The result document: atomic writing, and reading that refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from molmo_edge.bench import document
from molmo_edge.bench.document import Sample
from molmo_edge.errors import BenchmarkError
from tests.bench.double import DoubleVLM, measure

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_a_result_recorded_by_an_older_version_loads() -> None:
    assert document.load(RESULTS / "2026-11-22-stub-cpu.json").complete


def test_a_document_reads_back_as_written(tmp_path: Path) -> None:
    path, result = tmp_path / "new" / "r.json", measure(DoubleVLM())
    document.save(result, "page", path)
    assert document.dumps(document.load(path)) == document.dumps(result)
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

    monkeypatch.setattr(Path, "rename", full)
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
