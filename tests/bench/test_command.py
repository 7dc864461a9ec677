"""The command line from end to end on a double: options, files, exit status, forms of output."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from molmo_edge.bench import __main__ as cli
from molmo_edge.bench import command, store
from molmo_edge.errors import BenchmarkError, EngineStartError
from tests.bench.double import DoubleVLM, FakeClock
from tests.bench.test_compare import RESULTS
from tests.bench.test_document import published

QUICK = ["--iterations", "4", "--max-iterations", "4", "--max-tokens", "8"]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[command.Target, bool]]]:
    calls: list[tuple[command.Target, bool]] = []

    def build(self: command.Target, caches: bool) -> DoubleVLM:
        calls.append((self, caches))
        return DoubleVLM(FakeClock())

    monkeypatch.setattr(command.Target, "open", build)
    monkeypatch.delenv("MOLMO_EDGE_MODEL", raising=False)
    yield calls


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "160"})


def test_no_arguments_measure_the_three_cases_on_the_stub(
    opened: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run()
    assert done.exit_code == 0, done.output
    target, caches = opened[0]
    assert (target.model, target.config, caches) == ("stub", None, False)
    for word in ("Boardwalk Photo", "Complex Plot", "Data Interpretation"):
        assert word in done.stdout
    assert "random weights" in done.stdout
    assert "vLLM 0.32.0, torch 2.13.0+cpu, transformers 5.17.0" in " ".join(done.stdout.split())
    written = sorted((tmp_path / "bench-results").iterdir())
    assert [path.suffix for path in written] == [".json", ".md"]
    result = store.load(written[0])
    assert result.complete
    assert [row.name for row in result.scenarios[0].rows] == ["boardwalk", "panels", "linechart"]
    assert all(len(row.samples) >= 10 for row in result.scenarios[0].rows)
    jsonschema.validate(json.loads(written[0].read_text()), published())
    assert "random weights" in written[1].read_text()


def test_caches_are_off_unless_the_scenario_is_about_them() -> None:
    target = command.Target.chosen("m", None, {"max_crops": 4, "dtype": None})
    assert target.arguments(False) == {
        "max_crops": 4,
        "enable_prefix_caching": False,
        "mm_processor_cache_gb": 0.0,
    }
    assert target.arguments(True)["enable_prefix_caching"] is True


def test_a_model_from_the_environment_or_a_file_beats_the_stub(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MOLMO_EDGE_MODEL", raising=False)
    assert command.Target.chosen(None, None, {}).made_up
    assert command.Target.chosen(None, Path("thor.toml"), {}).model is None
    monkeypatch.setenv("MOLMO_EDGE_MODEL", "/models/molmo")
    assert command.Target.chosen(None, None, {}).model is None


def test_random_weights_have_answers_of_fixed_length_and_a_firm_limit() -> None:
    stub = command.plan_of(command.Target("stub"))
    assert (stub.ignore_eos, stub.firm, stub.iterations) == (True, True, 10)
    dummy = command.plan_of(command.Target("m", None, {"load_format": "dummy"}))
    assert dummy.ignore_eos
    real = command.plan_of(command.Target("m"))
    assert (real.ignore_eos, real.firm, real.max_tokens) == (False, False, 300)
    assert not command.plan_of(command.Target("stub"), iterations=30).firm
    assert command.plan_of(command.Target("m"), iterations=7).max_iterations == 14


@pytest.mark.parametrize(
    ("form", "check"),
    [
        ("json", lambda text: json.loads(text)["format"] == "molmo-edge-bench"),
        (
            "jsonl",
            lambda text: json.loads(text.splitlines()[0])["case"] == "boardwalk",
        ),
        ("csv", lambda text: len(list(csv.DictReader(io.StringIO(text)))) == 3),
        ("md", lambda text: text.startswith("# Benchmark")),
    ],
)
def test_every_form_goes_to_standard_output_alone(
    opened: list[Any], tmp_path: Path, form: str, check: Any
) -> None:
    done = run(*QUICK, "-o", form, "--output", str(tmp_path))
    assert done.exit_code == 0
    assert check(done.stdout)
    assert "0.32.0" in done.stdout


def test_own_pictures_and_a_named_file(opened: list[Any], tmp_path: Path) -> None:
    picture = tmp_path / "mug.png"
    Image.new("RGB", (30, 20)).save(picture)
    target = tmp_path / "deep" / "mine.json"
    done = run(*QUICK, "--image", str(picture), "--question", "What?", "--output", str(target))
    assert done.exit_code == 0
    row = store.load(target).scenarios[0].rows[0]
    assert (row.name, row.prompt) == ("mug", "What?")
    assert target.with_suffix(".md").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--iterations", "0"], "iterations"),
        (["--scenario", "speed"], "unknown scenario"),
        (["--image", "gone.png"], "gone.png"),
        (["--sizes", "640*480"], "--sizes"),
        (["--users", "a"], "--users"),
        (["--users", "0"], "1 or more"),
        (["--output", "/proc/none"], "cannot write"),
        (["--max-tokens", "0"], "max tokens"),
        (["--width", "0"], "interval width"),
    ],
)
def test_bad_input_is_one_clear_line_before_any_engine(
    opened: list[Any], tmp_path: Path, arguments: list[str], says: str
) -> None:
    done = run("--output", str(tmp_path / "out"), *arguments)
    assert done.exit_code == 2
    assert says in done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.output
    assert opened == []


def test_an_engine_that_cannot_start_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(self: command.Target, caches: bool) -> DoubleVLM:
        raise EngineStartError("no memory for the KV cache")

    monkeypatch.setattr(command.Target, "open", build)
    done = run("--output", str(tmp_path))
    assert done.exit_code == 2
    assert "no memory for the KV cache" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_with_130_and_a_readable_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(self: command.Target, caches: bool) -> DoubleVLM:
        return DoubleVLM(FakeClock(), failure=lambda n: KeyboardInterrupt() if n == 5 else None)

    monkeypatch.setattr(command.Target, "open", build)
    target = tmp_path / "r.json"
    done = run("--output", str(target))
    assert done.exit_code == 130
    assert not store.load(target).complete
    assert "INCOMPLETE" in done.stdout


def test_compare_prints_the_2025_table_beside_a_result(opened: list[Any], tmp_path: Path) -> None:
    mine = tmp_path / "mine.json"
    assert run(*QUICK, "--output", str(mine)).exit_code == 0
    historic = [str(path) for path in sorted(RESULTS.glob("2025-12-08-*.json"))]
    done = run("compare", *historic, str(mine))
    assert done.exit_code == 0
    assert "103.8 (5.0)" in done.stdout
    assert "11.1 (3.1)" in done.stdout
    assert "not alike: power mode is unknown" in done.stdout
    assert run("compare", *historic, str(mine), "--strict").exit_code == 1
    assert "| 103.8 (5.0) |" in run("compare", *historic, "-o", "md").stdout


@pytest.mark.parametrize("verb", ["compare", "report"])
def test_foreign_files_are_refused(tmp_path: Path, verb: str) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"model": "x"}')
    done = run(verb, str(path))
    assert done.exit_code == 2
    assert "not a benchmark result" in done.stderr


def test_report_writes_a_page_and_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    historic = [str(path) for path in sorted(RESULTS.glob("2025-12-08-*.json"))]
    page, folder = tmp_path / "r.html", tmp_path / "png"
    done = run("report", *historic, "--output", str(page), "--png", str(folder))
    assert done.exit_code == 0, done.output
    assert page.read_text().startswith("<!doctype html>")
    assert [path.name for path in folder.iterdir()] == ["devices.png"]


def test_the_schema_is_printed() -> None:
    done = run("schema")
    assert json.loads(done.stdout) == published()


@pytest.mark.parametrize(
    ("text", "sizes"), [(None, ()), ("", ()), ("640x480, 32x24", ((640, 480), (32, 24)))]
)
def test_sizes_are_width_by_height(text: str | None, sizes: tuple[tuple[int, int], ...]) -> None:
    assert command.sizes_of(text) == sizes


@pytest.mark.parametrize("text", ["0x10", "10", "axb", "1e3x10", "640x480;1x1"])
def test_odd_sizes_are_refused(text: str) -> None:
    with pytest.raises(BenchmarkError, match="--sizes"):
        command.sizes_of(text)


def test_labels_cannot_leave_the_folder(tmp_path: Path) -> None:
    files = command.Files.at(tmp_path, "../../etc/pass wd")
    assert files.json.parent == tmp_path
    assert command.Files.at(tmp_path, "///").json.name.endswith("-result.json")
