"""The command line from end to end on a double: options, files, exit status, forms of output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from molmo_edge.bench import document
from molmo_edge.bench.environment import Target
from molmo_edge.cli import bench as cli
from molmo_edge.errors import EngineStartError
from molmo_edge.models.hub import DEMO
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
    target = Target.choose(model="m", max_crops=4, dtype=None)
    off = {"enable_prefix_caching": False}
    assert target.arguments(False) == {"model": "m", "max_crops": 4, **off}
    assert target.arguments(True)["enable_prefix_caching"] is True
    assert target.arguments(None) == {"model": "m", "max_crops": 4}


def test_a_model_from_the_environment_or_a_file_beats_the_stub(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MOLMO_EDGE_MODEL", raising=False)
    assert Target.choose().random_weights
    assert not Target.choose(DEMO).random_weights
    Path(".env").write_text("MOLMO_EDGE_MODEL=m\nMOLMO_EDGE_LOAD_FORMAT=dummy\n")
    assert Target.choose().model == "m"
    assert Target.choose(model="n").random_weights
    Path(".env").unlink()
    assert Target("m", None, {"load_format": "dummy"}).random_weights
    Path("thor.toml").write_text('model = "of-the-file"')
    assert Target.choose(config=Path("thor.toml")).model == "of-the-file"
    monkeypatch.setenv("MOLMO_EDGE_MODEL", "/models/molmo")
    assert Target.choose().model == "/models/molmo"


def test_json_of_the_users_own_image_goes_to_standard_output_alone(
    opened: Opened, tmp_path: Path
) -> None:
    image, target = tmp_path / "mug.png", tmp_path / "deep" / "mine.json"
    Image.new("RGB", (30, 20)).save(image)
    picked = ["--image", str(image), "--question", "What?", "--output", str(target)]
    result = run(*QUICK, *picked, "--json")
    assert result.exit_code == 0 and result.stdout == target.read_text()
    row = document.load(target).scenarios[0].rows[0]
    assert (row.name, row.prompt) == ("mug", "What?")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--iterations", "0"], "'--iterations'"),
        (["--scenario", "speed"], "BenchmarkError: unknown scenario"),
        (["--image", "gone.png"], "BenchmarkError: cannot use the image gone.png"),
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


def test_report_writes_a_page(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = tmp_path / "r.html"
    result = run("report", *HISTORIC, "--output", str(page))
    assert result.exit_code == 0, result.output
    assert page.read_text().startswith("<!doctype html>")


def test_a_quick_run_prints_the_rates_of_one_image_as_llama_bench_names_them(
    opened: Opened, tmp_path: Path
) -> None:
    result = run("--quick", "--output", str(tmp_path / "q.json"))
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    # 1,210 prompt tokens in 0.25 s, 128 answer tokens at 50 per second.
    assert "Boardwalk Photo pp1210 4840.00 ± 0.00" in lines
    assert "Boardwalk Photo tg128 50.00 ± 0.00" in lines
    assert "random weights" in result.stdout
    row = document.load(tmp_path / "q.json").scenarios[0].rows[0]
    assert {"pp1210", "tg128"} < row.counts.keys()
    assert sum(sample.e2e_s or 0 for sample in row.samples) <= 30


def test_compare_prints_the_2025_table_beside_a_result(opened: Opened, tmp_path: Path) -> None:
    mine = str(tmp_path / "mine.json")
    assert run(*QUICK, "--output", mine).exit_code == 0
    result = run("compare", *HISTORIC, mine)
    assert result.exit_code == 0
    assert "not comparable: power mode" in result.stdout
    compared = run("compare", *HISTORIC, mine, "--strict", "--json")
    assert compared.exit_code == 1
    content = json.loads(compared.stdout)
    assert content["lines"]["mean tok/s (std)"][0] == "103.8 (5.0)"
    assert "power mode is unknown" in content["flags"]["power mode"]
    again = str(tmp_path / "again.json")
    assert run(*QUICK, "--output", again).exit_code == 0
    assert run("compare", mine, again, "--strict").exit_code == 0  # the same machine and settings


@pytest.mark.parametrize("wrong", [["--max-tokens", "0"], ["--dtype", "a,b"], ["--max-kl", "-1"]])
def test_drift_refuses_bad_bounds(tmp_path: Path, wrong: list[str]) -> None:
    result = run("drift", "--kv-cache-dtype", "auto,fp8", "--output", str(tmp_path), *wrong)
    assert result.exit_code == 2 and result.stderr
