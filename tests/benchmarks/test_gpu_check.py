"""The GPU check: continues a file, keeps what it has, and records what could not run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gpu_check
import harness
import pytest

from molmo_edge.errors import BenchmarkError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = f"""
import sys, time
sys.path[:0] = [{str(ROOT / "benchmarks")!r}, {str(ROOT)!r}]
import harness
from molmo_edge.errors import BenchmarkError, EngineStartError
def works(emit, options): emit("speed", 0); emit("speed", options["speed"])
def fails(emit, options): emit("speed", 1); raise BenchmarkError("no more") from OSError("disk")
def unusable(emit, options): emit("speed", 1); raise EngineStartError("no kernel")
def crashes(emit, options): emit("speed", 1); raise SystemError("a bug")
def sleeps(emit, options): emit("speed", 1); time.sleep(600)
harness.serve_child(dict(works=works, fails=fails, unusable=unusable, crashes=crashes,
                         sleeps=sleeps))
"""


@pytest.mark.parametrize(
    ("name", "status", "error"),
    [
        ("works", "ok", ""),
        ("fails", "failed", "BenchmarkError: no more <- OSError: disk"),
        ("unusable", "unusable", "EngineStartError: no kernel"),
        ("crashes", "failed", "SystemError: a bug"),
        ("sleeps", "timeout", "ended after"),
    ],
)
def test_a_child_keeps_what_it_measured_and_its_failure(
    tmp_path: Path, name: str, status: str, error: str
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    limit_s = 5 if status == "timeout" else 60
    outcome = harness.run_child(str(script), name, {"speed": 1}, limit_s=limit_s)
    assert outcome["status"] == status and error in (outcome["error"] or "")
    # Of the machine's directories nothing is recorded.
    assert str(Path(harness.__file__).parent) not in (outcome["error"] or "")
    if status != "timeout":
        assert outcome["values"] == {"speed": 1}


def test_a_second_run_does_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, statuses, ran = tmp_path / "out.json", {"b": "failed", "c": "unusable"}, []

    def run_child(script: str, name: str, options: Any, **more: Any) -> dict[str, Any]:
        ran.append(options["id"])
        status = statuses.get(options["id"], "ok")
        return {"status": status, "seconds": 1.0, "error": None, "values": {}}

    def run(names: str, **options: Any) -> dict[str, str]:
        cases = [gpu_check.Case("verify", name, {"id": name}) for name in names]
        document = gpu_check.run(cases, output, **options)
        assert json.loads(output.read_text()) == json.loads(json.dumps(document))
        return {name: one["status"] for name, one in document["stages"]["verify"].items()}

    monkeypatch.setattr(harness, "run_child", run_child)
    assert run("abc") == {"a": "ok", "b": "failed", "c": "unusable"}
    statuses.clear()
    assert run("abcd") == {"a": "ok", "b": "ok", "c": "unusable", "d": "ok"}
    assert ran == [*"abc", *"bd"]
    assert run("e", limits_s={"verify": 0.0})["e"] == "not run"


def test_a_file_of_something_else_or_of_other_software_is_not_continued(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    for text in ("no json", '{"format": "other"}', "[1]"):
        output.write_text(text)
        with pytest.raises(BenchmarkError, match="choose another file"):
            gpu_check.begin(output)
        assert output.read_text() == text
    output.unlink()
    document = gpu_check.begin(output)
    document["software"]["vllm"] = "0.0.1"
    output.write_text(json.dumps(document))
    with pytest.raises(BenchmarkError, match="other software"):
        gpu_check.begin(output)


@pytest.mark.parametrize("cases", [gpu_check.cuda_cases, gpu_check.cpu_cases])
def test_every_stage_has_cases_with_names_of_their_own(cases: Any) -> None:
    planned = list(cases())
    assert {case.stage for case in planned} == set(gpu_check.LIMITS_S)
    assert sum(gpu_check.LIMITS_S.values()) <= 15 * 60
    assert len({(case.stage, case.name) for case in planned}) == len(planned)
    assert {case.function for case in planned} <= set(gpu_check.MEASUREMENTS)


def test_backends_are_given_where_a_case_names_none() -> None:
    cases = {case.name: case for case in gpu_check.cuda_cases()}
    named = gpu_check.with_backends(cases["FLASH_ATTN, vision TORCH_SDPA"], "A", "B")
    assert named.options["engine_args"]["mm_encoder_attn_backend"] == "TORCH_SDPA"
    free = gpu_check.with_backends(cases["bf16 kv auto"], "A", "B")
    assert free.options["engine"]["attention_backend"] == "A"


def test_tables_give_the_fraction_of_the_bandwidth_and_the_reason_of_a_failure() -> None:
    ok = {"status": "ok", "error": None}
    few = {
        "decode_tps": {"mean": 50.0},
        "ttft_s": {"median": 0.5},
        "ceiling": {"bytes_per_token": 15e9},
    }
    decode = {
        "copy": {**ok, "values": {"bandwidth_bytes_s": 1e12}},
        "bf16 kv auto": {**ok, "values": {"2 crops": few}},
        "fp8 kv auto": {"status": "unusable", "error": "no | kernel", "values": {}},
    }
    device = {"name": "GPU", "driver": "1", "cuda": None}
    text = gpu_check.markdown(
        {"device": device, "software": {"vllm": "0.32.0"}, "stages": {"decode": decode}}
    )
    assert text.startswith("GPU, driver 1, CUDA –; vllm 0.32.0")
    assert "| bf16 kv auto | 50.0 | 15.00 | 75% | 0.500 |  |" in text
    assert "| fp8 kv auto | – | – | – | – | unusable: no \\| kernel |" in text
