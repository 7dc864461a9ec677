"""The GPU check: continues a file, keeps what it has, and records what could not run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gpu_check
import harness
import pytest

from molmo_edge.errors import BenchmarkError

OK = {"status": "ok", "seconds": 1.0, "options": {}, "error": None, "values": {}}

SCRIPT = """
import sys, time
sys.path[:0] = [{benchmarks!r}, {root!r}]
import harness
from molmo_edge.errors import BenchmarkError, EngineStartError
def works(emit, options): emit("speed", [1]); emit("speed", options["speeds"])
def fails(emit, options): emit("speed", [1]); raise BenchmarkError("no more") from OSError("disk")
def unusable(emit, options): raise EngineStartError("no kernel")
def crashes(emit, options): emit("speed", [1]); raise SystemError("a bug")
def sleeps(emit, options): emit("speed", [1]); time.sleep(600)
harness.serve_child(dict(works=works, fails=fails, unusable=unusable, crashes=crashes,
                         sleeps=sleeps))
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = Path(__file__).resolve().parents[2]
    path = tmp_path_factory.mktemp("script") / "script.py"
    path.write_text(SCRIPT.format(benchmarks=str(root / "benchmarks"), root=str(root)))
    return str(path)


@pytest.mark.parametrize(
    ("name", "status", "error"),
    [
        ("works", "ok", None),
        ("fails", "failed", "BenchmarkError: no more <- OSError: disk"),
        ("unusable", "unusable", "EngineStartError: no kernel"),
        ("crashes", "failed", "SystemError: a bug"),
    ],
)
def test_a_child_keeps_what_it_measured_and_its_failure(
    script: str, name: str, status: str, error: str | None
) -> None:
    outcome = harness.run_child(script, name, {"speeds": [1, 2]}, limit_s=60)
    assert outcome["status"] == status and (error or "") in (outcome["error"] or "")
    expected = {"works": [1, 2], "fails": [1], "crashes": [1]}.get(name)
    assert outcome["values"].get("speed") == expected


def test_a_child_that_takes_too_long_is_ended(script: str) -> None:
    outcome = harness.run_child(script, "sleeps", {}, limit_s=5)
    assert outcome["status"] == "timeout" and outcome["seconds"] < 30


class Children:
    """Stands in for `run_child`: ends with given statuses and keeps which cases ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **status: str) -> None:
        self.status, self.ran = status, list[str]()
        monkeypatch.setattr(harness, "run_child", self)

    def __call__(self, script: str, name: str, options: Any, **more: Any) -> dict[str, Any]:
        self.ran.append(options["id"])
        return {**OK, "status": self.status.get(options["id"], "ok")}


def planned(*names: str) -> list[gpu_check.Case]:
    return [gpu_check.Case("verify", name, {"id": name}) for name in names]


def test_a_second_run_does_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.json"
    first = Children(monkeypatch, b="failed", c="unusable")
    gpu_check.run(planned("a", "b", "c"), output)
    second = Children(monkeypatch)
    document = gpu_check.run(planned("a", "b", "c", "d"), output)
    assert (first.ran, second.ran) == (["a", "b", "c"], ["b", "d"])
    assert json.loads(output.read_text()) == json.loads(json.dumps(document))
    statuses = {name: one["status"] for name, one in document["stages"]["verify"].items()}
    assert statuses == {"a": "ok", "b": "ok", "c": "unusable", "d": "ok"}
    late = gpu_check.run(planned("e"), output, limits_s={"verify": 0.0})
    assert late["stages"]["verify"]["e"]["status"] == "not run"


def test_a_file_of_something_else_or_of_other_software_is_not_continued(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    for text in ("no json", '{"format": "other"}', "[1]"):
        output.write_text(text)
        with pytest.raises(BenchmarkError, match="choose another file"):
            gpu_check.begin(output)
        assert output.read_text() == text
    output.unlink()
    document = gpu_check.begin(output)
    assert {"name", "driver", "cuda"} <= document["device"].keys()
    document["software"]["vllm"] = "0.0.1"
    output.write_text(json.dumps(document))
    with pytest.raises(BenchmarkError, match="other software"):
        gpu_check.begin(output)


@pytest.mark.parametrize("cases", [gpu_check.cuda_cases, gpu_check.cpu_cases])
def test_every_stage_has_cases_with_names_of_their_own(cases: Any) -> None:
    planned_cases = list(cases())
    assert {case.stage for case in planned_cases} == set(gpu_check.LIMITS_S)
    assert sum(gpu_check.LIMITS_S.values()) <= 15 * 60
    names = [(case.stage, case.name) for case in planned_cases]
    assert len(set(names)) == len(names)
    assert all(case.function in gpu_check.MEASUREMENTS for case in planned_cases)
    json.dumps([dict(case.options) for case in planned_cases])


def test_backends_are_given_where_a_case_names_none() -> None:
    cases = {case.name: case for case in gpu_check.cuda_cases()}
    named = gpu_check.with_backends(cases["FLASH_ATTN, vision TORCH_SDPA"], "A", "B")
    assert named.options["engine_args"]["mm_encoder_attn_backend"] == "TORCH_SDPA"
    free = gpu_check.with_backends(cases["bf16 kv auto"], "A", "B")
    assert free.options["engine"]["attention_backend"] == "A"
    assert gpu_check.with_backends(cases["copy"], "A", "B") == cases["copy"]


def test_tables_give_the_fraction_of_the_bandwidth_and_the_reason_of_a_failure() -> None:
    few = {
        "decode_tps": {"mean": 50.0},
        "ttft_s": {"median": 0.5},
        "ceiling": {"bytes_per_token": 15e9},
    }
    stages = {
        "decode": {
            "copy": {**OK, "values": {"bandwidth_bytes_s": 1e12}},
            "bf16 kv auto": {**OK, "values": {"2 crops": few}},
            "fp8 kv auto": {**OK, "status": "unusable", "error": "no | kernel"},
        }
    }
    device = {"name": "GPU", "driver": "1", "cuda": None}
    text = gpu_check.markdown({"device": device, "software": {"vllm": "0.32.0"}, "stages": stages})
    assert text.startswith("GPU, driver 1, CUDA –; vllm 0.32.0")
    assert "| bf16 kv auto | 50.0 | 15.00 | 75% | 0.500 |  |" in text
    assert "| fp8 kv auto | – | – | – | – | unusable: no \\| kernel |" in text
