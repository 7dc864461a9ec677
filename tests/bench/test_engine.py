"""The benchmark on the real engine and the stub: every metric is there, the caches are proved."""

from __future__ import annotations

import contextlib

import pytest
from PIL import Image

from molmo_edge import EdgeVLM
from molmo_edge.bench import drift, scenarios
from molmo_edge.bench.cases import Case
from molmo_edge.bench.measure import Bench, RunOptions

pytestmark = pytest.mark.engine

IMAGE = Image.new("RGB", (60, 40), (90, 120, 30))
CASE = Case("small", "Small", "What is this?", IMAGE, max_crops=1)


def test_every_request_has_its_metrics_and_reuse_is_ruled_out(stub_vlm: EdgeVLM) -> None:
    options = RunOptions(iterations=4, max_iterations=4, max_tokens=8, ignore_eos=True)
    bench = Bench(cases=(CASE,), options=options, sensors=True)
    result = scenarios.run(bench, lambda caches: contextlib.nullcontext(stub_vlm), ["report"])
    assert result.complete, result.scenarios
    software, model = result.environment.software, result.environment.model
    assert software["vllm"] and software["torch"] and software["transformers"]
    assert (model.name, model.random_weights) == ("stub", True) and model.max_num_seqs is not None
    assert result.startup is not None
    assert result.startup.stages and result.startup.first_request is not None
    row = result.scenarios[0].rows[0]
    assert row.caches is not None and (row.caches.cached_tokens, row.caches.proved) == (0, True)
    assert row.ceiling is not None and (row.ceiling.bytes_per_token or 0) > 0
    assert len(row.samples) == 4
    for sample in row.samples:
        assert (sample.error, sample.output_tokens, len(sample.itl_s)) == (None, 8, 7)
        for name in ("preprocess_s", "prefill_s", "ttft_s", "e2e_s", "output_tps", "request_tps"):
            assert (getattr(sample, name) or 0) > 0, name
        assert 0 < (sample.image_tokens or 0) < (sample.prompt_tokens or 0)
        assert (sample.ttft_s or 0) < (sample.e2e_s or 0) <= (sample.wall_s or 0)


def test_a_configuration_does_not_drift_from_itself(stub_vlm: EdgeVLM) -> None:
    reference = drift.answer_all(stub_vlm, [CASE], max_tokens=3)[0]
    same = drift.against(stub_vlm, *reference, max_tokens=3)
    assert (same.tokens, same.first_divergence, same.equal_greedy) == (3, None, 1.0)
    assert same.max_abs_dlogprob < 1e-3 and same.mean_kl < 1e-3
