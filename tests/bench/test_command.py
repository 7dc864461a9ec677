"""The command line from end to end on a double: options, files, exit status, forms of output."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from molmo_edge.bench import document
from molmo_edge.bench.environment import Target
from molmo_edge.cli import bench as cli
from molmo_edge.errors import EngineStartError
from tests.bench.double import DoubleVLM
from tests.bench.test_document import RESULTS

QUICK = ["--iterations", "4", "--max-iterations", "4", "--max-tokens", "8"]
HISTORIC = [str(path) for path in sorted(RESULTS.glob("2025-12-08-*.json"))]

Opened = list[tuple[Target, bool]]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opened:
    """Every engine is a double; the targets opened."""
    calls: Opened = []

    def build(self: Target, caches: bool) -> DoubleVLM:
        calls.append((self, caches))
        return DoubleVLM()

    monkeypatch.setattr(Target, "open", build)
    monkeypatch.delenv("MOLMO_EDGE_MODEL", raising=False)
    return calls


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "200"})


def test_no_arguments_measure_the_three_cases_on_the_stub(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run()
    assert result.exit_code == 0, result.output
    target, caches = opened[0]
    assert (target.model, target.config, caches) == ("stub", None, False)
    for text in ("Boardwalk Photo", "Complex Plot", "Data Interpretation", "random weights"):
        assert text in result.stdout
    assert "vLLM 0.32.0, torch 2.13.0+cpu, transformers 5.17.0" in " ".join(result.stdout.split())
    written = sorted((tmp_path / "bench-results").iterdir())
    assert [path.suffix for path in written] == [".json", ".md"]
    kept = document.load(written[0])
    assert kept.complete
    assert [row.name for row in kept.scenarios[0].rows] == ["boardwalk", "panels", "linechart"]
    assert all(len(row.samples) >= 10 for row in kept.scenarios[0].rows)
    assert "random weights" in written[1].read_text()


def test_caches_are_off_unless_the_scenario_is_about_them() -> None:
    target = Target.choose("m", None, {"max_crops": 4, "dtype": None})
    off = {"enable_prefix_caching": False, "mm_processor_cache_gb": 0.0}
    assert target.arguments(False) == {"model": "m", "max_crops": 4, **off}
    assert target.arguments(True)["enable_prefix_caching"] is True
    assert target.arguments(None) == {"model": "m", "max_crops": 4}


def test_a_model_from_the_environment_or_a_file_beats_the_stub(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MOLMO_EDGE_MODEL", raising=False)
    assert Target.choose(None, None, {}).random_weights
    assert Target("m", None, {"load_format": "dummy"}).random_weights
    assert Target.choose(None, Path("thor.toml"), {}).model is None
    monkeypatch.setenv("MOLMO_EDGE_MODEL", "/models/molmo")
    assert Target.choose(None, None, {}).model is None


def test_json_of_the_users_own_image_goes_to_standard_output_alone(
    opened: Opened, tmp_path: Path
) -> None:
    image, target = tmp_path / "mug.png", tmp_path / "deep" / "mine.json"
    Image.new("RGB", (30, 20)).save(image)
    picked = ["--image", str(image), "--question", "What?", "--output", str(target)]
    result = run(*QUICK, *picked, "-o", "json")
    assert result.exit_code == 0 and result.stdout == target.read_text()
    row = document.load(target).scenarios[0].rows[0]
    assert (row.name, row.prompt) == ("mug", "What?")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--iterations", "0"], "'--iterations'"),
        (["--scenario", "speed"], "BenchmarkError: unknown scenario"),
        (["--image", "gone.png"], "BenchmarkError: cannot use the image gone.png"),
        *((["--sizes", text], "'--sizes'") for text in ("640*480", "0x10", "1e3x10")),
        (["--rates", "-1"], "'--rates'"),
        *((["--batches", text], "'--batches'") for text in ("a", "0", "1.5", "1,,2")),
        (["--output", "/proc/none"], "BenchmarkError: cannot write"),
    ],
)
def test_bad_input_is_refused_by_name_before_any_engine(
    opened: Opened, tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = run("--output", str(tmp_path / "out"), *arguments)
    assert result.exit_code == 2 and opened == []
    assert message in result.stderr and "Traceback" not in result.output


def test_an_engine_that_cannot_start_and_ctrl_c_have_their_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Target, caches: bool) -> DoubleVLM:
        raise EngineStartError("no memory for the KV cache")

    def interrupted(self: Target, caches: bool) -> DoubleVLM:
        return DoubleVLM(failure=lambda n: KeyboardInterrupt() if n == 5 else None)

    target = tmp_path / "r.json"
    monkeypatch.setattr(Target, "open", broken)
    result = run("--output", str(target))
    assert result.exit_code == 2 and "no memory for the KV cache" in result.stderr
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(Target, "open", interrupted)
    result = run("--output", str(target))
    assert result.exit_code == 130 and "INCOMPLETE" in result.stdout
    kept = document.load(target)
    assert not kept.complete and any("interrupted" in note for note in kept.notes)
    assert kept.scenarios[0].rows[0].stopped == "interrupted"
    assert len(kept.scenarios[0].rows[0].samples) == 4


def test_report_writes_a_page_and_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page, directory = tmp_path / "r.html", tmp_path / "png"
    result = run("report", *HISTORIC, "--output", str(page), "--png", str(directory))
    assert result.exit_code == 0, result.output
    assert page.read_text().startswith("<!doctype html>")
    assert [path.name for path in directory.iterdir()] == ["devices.png"]


def test_the_schema_describes_a_result(opened: Opened, tmp_path: Path) -> None:
    mine = tmp_path / "mine.json"
    assert run(*QUICK, "--output", str(mine)).exit_code == 0
    jsonschema.validate(json.loads(mine.read_text()), json.loads(run("schema").stdout))
    assert "drifts" in json.loads(run("schema", "--drift").stdout)["properties"]


def test_compare_prints_the_2025_table_beside_a_result(opened: Opened, tmp_path: Path) -> None:
    mine = str(tmp_path / "mine.json")
    assert run(*QUICK, "--output", mine).exit_code == 0
    result = run("compare", *HISTORIC, mine)
    assert result.exit_code == 0
    assert "not comparable: power mode" in result.stdout
    assert run("compare", *HISTORIC, mine, "--strict").exit_code == 1
    assert "| 103.8 (5.0) |" in run("compare", *HISTORIC, "-o", "md").stdout


@pytest.mark.parametrize("wrong", [["--max-tokens", "0"], ["--dtype", "a,b"], ["--max-kl", "-1"]])
def test_drift_refuses_bad_bounds(tmp_path: Path, wrong: list[str]) -> None:
    result = run("drift", "--kv-cache-dtype", "auto,fp8", "--output", str(tmp_path), *wrong)
    assert result.exit_code == 2 and result.stderr
