"""The GPU check as a machine: resumes, keeps what it has, and says what it could not run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import _checks
import _plans
import _summary
import gpu_check
import pytest

from molmo_edge.devices.detect import detect
from molmo_edge.errors import BenchmarkError

OK = {"status": "ok", "seconds": 1.0, "options": {}, "error": None, "found": {}}


class Cases:
    """Stands in for `in_process`: answers with given statuses and keeps which cases were run."""

    def __init__(self, **status: str) -> None:
        self.status, self.ran = status, list[str]()

    def __call__(self, case: Any, limit_s: float) -> dict[str, Any]:
        self.ran.append(case.name)
        return {**OK, "status": self.status.get(case.name, "ok")}


@pytest.fixture
def device() -> Any:
    return detect(gpu=False)


def planned(*names: str) -> list[Any]:
    return [_plans.Case("verify", name) for name in names]


def test_a_second_run_does_only_what_is_missing(
    tmp_path: Path, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.json"
    first = Cases(b="failed", c="unusable")
    monkeypatch.setattr(gpu_check, "in_process", first)
    gpu_check.run(planned("a", "b", "c"), output, device)
    second = Cases()
    monkeypatch.setattr(gpu_check, "in_process", second)
    document = gpu_check.run(planned("a", "b", "c", "d"), output, device)
    assert (first.ran, second.ran) == (["a", "b", "c"], ["b", "d"])
    assert json.loads(output.read_text()) == json.loads(json.dumps(document))
    assert {name: one["status"] for name, one in document["stages"]["verify"].items()} == {
        "a": "ok", "b": "ok", "c": "unusable", "d": "ok",
    }  # fmt: skip


def test_what_a_stage_has_no_time_for_is_left_for_the_next_run(
    tmp_path: Path, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = Cases()
    monkeypatch.setattr(gpu_check, "in_process", cases)
    limits = {"verify": 0.0}
    document = gpu_check.run(planned("a"), tmp_path / "o.json", device, limits_s=limits)
    assert document["stages"]["verify"]["a"]["status"] == "not run"
    gpu_check.run(planned("a"), tmp_path / "o.json", device)
    assert cases.ran == ["a"]


@pytest.mark.parametrize("text", ["no json", '{"format": "other"}', "[1]"])
def test_a_foreign_file_is_not_overwritten(tmp_path: Path, device: Any, text: str) -> None:
    output = tmp_path / "out.json"
    output.write_text(text)
    with pytest.raises(BenchmarkError, match="choose another file"):
        gpu_check.begin(output, device)
    assert output.read_text() == text


def test_a_result_of_other_software_is_not_gone_on_with(tmp_path: Path, device: Any) -> None:
    output = tmp_path / "out.json"
    found = gpu_check.begin(output, device)
    found["software"]["vllm"] = "0.0.1"
    output.write_text(json.dumps(found))
    with pytest.raises(BenchmarkError, match="other software"):
        gpu_check.begin(output, device)


def test_a_case_that_crashes_is_recorded_with_the_end_of_its_log() -> None:
    found = gpu_check.in_process(_plans.Case("no such stage", "x"), 60)
    assert found["status"] == "failed"
    assert "KeyError" in found["error"]


def test_a_case_that_takes_too_long_is_ended() -> None:
    found = gpu_check.in_process(_plans.Case("soak", "x", {"seconds": 1e9}), 0.05)
    assert found["status"] == "timeout" and found["seconds"] < 10


def test_what_was_told_before_the_end_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(tell: Any, options: Any) -> None:
        tell("speed", [1])
        tell("speed", [1, 2])
        raise BenchmarkError("no more")

    monkeypatch.setattr(_checks, "STAGES", {"decode": breaks})
    gpu_check.child(json.dumps({"stage": "decode", "name": "x"}), tmp_path / "parts")
    lines = [json.loads(line) for line in (tmp_path / "parts").read_text().splitlines()]
    assert lines[:2] == [{"speed": [1]}, {"speed": [1, 2]}]
    assert lines[2]["outcome"] == {"status": "failed", "error": "BenchmarkError: no more"}


@pytest.mark.parametrize("device_kind", ["cuda", "cpu"])
def test_every_stage_has_cases_with_names_of_their_own(device_kind: str) -> None:
    found = _plans.cases(device_kind)
    assert {case.stage for case in found} == set(_plans.STAGES) == set(_plans.LIMITS_S)
    names = [(case.stage, case.name) for case in found]
    assert len(set(names)) == len(names)
    assert all((case.kind or case.stage) in _checks.STAGES for case in found)
    json.dumps([dict(case.options) for case in found])


def test_the_gpu_plan_holds_what_has_to_be_proved() -> None:
    found = _plans.cases("cuda", gpu_bytes=16 * 10**9)
    verify = [case for case in found if case.stage == "verify"]
    dtypes = {case.options["dtype"] for case in verify}
    assert dtypes == {"float32", "bfloat16"}
    assert any(case.options.get("stock") for case in verify)
    decode = {case.name for case in found if case.stage == "decode"}
    assert {"copy", "bf16 kv auto", "fp8 kv auto", "bf16 kv fp8_per_token_head"} <= decode
    # Two engines of 17 GB do not fit 16 GB together.
    assert [case.name for case in found if case.stage == "overhead"] == ["stub"]


def test_backends_are_given_where_a_case_names_none() -> None:
    found = {case.name: case for case in _plans.cases("cuda")}
    named = _plans.with_backends(found["float32 TRITON_ATTN vision TORCH_SDPA"], "A", "B")
    assert named.options["engine_args"]["mm_encoder_attn_backend"] == "TORCH_SDPA"
    free = _plans.with_backends(found["bf16 kv auto"], "A", "B")
    assert free.options["engine"]["attention_backend"] == "A"
    assert free.options["engine"]["model"] == _plans.SEVEN_B
    assert _plans.with_backends(found["copy"], "A", "B") == found["copy"]


def test_memory_that_grows_is_seen_and_the_first_quarter_may_warm_up() -> None:
    flat = [{"rss_bytes": value} for value in (50, 100, 100, 100, 100, 100, 100, 100)]
    rising = [{"rss_bytes": 100 + 10 * i} for i in range(8)]
    assert _checks.growth(flat, "rss_bytes") == 0
    assert (_checks.growth(rising, "rss_bytes") or 0) > 0.3
    assert _checks.growth([{"device_bytes": None}] * 8, "device_bytes") is None


def test_tables_say_how_near_the_ceiling_decode_is() -> None:
    copied = {**OK, "found": {"bandwidth_bytes_s": 1e12}}
    one = {**OK, "found": {"decode_tps": [50.0, 60.0, 40.0], "bytes_per_token": 15e9}}
    bad = {**OK, "status": "unusable", "error": "no | kernel"}
    text = _summary.markdown(
        {
            "device": {"name": "GPU", "driver": "1", "cuda": None},
            "software": {"vllm": "0.32.0"},
            "stages": {"decode": {"copy": copied, "bf16 kv auto": one, "fp8 kv auto": bad}},
        }
    )
    assert "| bf16 kv auto | 50.0 | 15.00 | 75% | – | – |" in text
    assert "| fp8 kv auto | unusable | – | – | – | no / kernel |" in text
