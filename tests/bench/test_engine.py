"""The benchmark on the real engine and the stub: every metric is there, the caches are proved."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import pytest
from PIL import Image

from molmo_edge import EdgeVLM
from molmo_edge.bench import ceilings, drift
from molmo_edge.bench.cases import Case, text_only
from molmo_edge.bench.document import Document
from molmo_edge.bench.measure import Plan
from molmo_edge.bench.scenarios import Load
from molmo_edge.bench.suite import Suite

pytestmark = pytest.mark.engine

CASE = Case("small", "Small", "What is this?", Image.new("RGB", (60, 40), (90, 120, 30)))


def measured(vlm: EdgeVLM, *names: str, cases: tuple[Case, ...]) -> Document:
    def opened(caches: bool) -> AbstractContextManager[EdgeVLM]:
        assert not caches
        return contextlib.nullcontext(vlm)

    return Suite(
        open=opened,
        cases=cases,
        plan=Plan(iterations=4, max_iterations=4, max_tokens=8, ignore_eos=True),
        names=names,
        load=Load(batches=(2,), users=(2,), rates=(20.0,)),
        meter=ceilings.Meter.of,
    ).run()


@pytest.fixture(scope="module")
def result(stub_vlm: EdgeVLM) -> Document:
    case = Case(CASE.name, CASE.title, CASE.question, CASE.image, max_crops=1)
    return measured(stub_vlm, "report", cases=(case,))


def test_a_run_on_the_real_engine_is_complete(result: Document) -> None:
    assert [scenario.error for scenario in result.scenarios] == [None]
    assert result.complete


def test_requests_in_flight_together_are_measured_one_by_one(stub_vlm: EdgeVLM) -> None:
    # Without pictures, which cost seconds each on a CPU and are measured above.
    loaded = measured(stub_vlm, "throughput", "concurrency", cases=text_only())
    assert loaded.complete
    batch, closed, arriving = (row for scenario in loaded.scenarios for row in scenario.rows)
    assert [wave.output_tokens for wave in batch.waves] == [16] * 4
    assert len(closed.samples) == 8 and len(arriving.samples) == 8
    for row in (batch, closed, arriving):
        assert all(sample.output_tokens == 8 for sample in row.samples)
        assert row.caches is not None and row.caches.proved


def test_every_request_has_its_metrics(result: Document) -> None:
    samples = result.scenarios[0].rows[0].samples
    assert len(samples) == 4
    for sample in samples:
        assert sample.error is None
        assert sample.output_tokens == 8
        assert len(sample.itl_s) == 7
        for name in ("preprocess_s", "prefill_s", "ttft_s", "e2e_s", "output_tps", "request_tps"):
            assert (getattr(sample, name) or 0) > 0, name
        assert sample.image_tokens is not None and sample.prompt_tokens is not None
        assert 0 < sample.image_tokens < sample.prompt_tokens
        assert sample.ttft_s is not None and sample.e2e_s is not None
        assert sample.ttft_s < sample.e2e_s <= (sample.wall_s or 0)


def test_the_engines_counter_proves_that_nothing_was_reused(result: Document) -> None:
    for scenario in result.scenarios:
        for row in scenario.rows:
            assert row.caches is not None
            assert (row.caches.cached_tokens, row.caches.proved) == (0, True)


def test_the_environment_names_what_made_the_numbers(result: Document) -> None:
    software, model = result.environment.software, result.environment.model
    assert software.vllm and software.torch and software.transformers
    assert model.name == "stub"
    assert model.random_weights is True
    assert model.max_num_seqs is not None
    assert result.startup is not None
    assert result.startup.stages and result.startup.first_request is not None


def test_bytes_a_token_are_known_for_the_stub(result: Document) -> None:
    ceiling = result.scenarios[0].rows[0].ceiling
    assert ceiling is not None
    assert (ceiling.bytes_per_token or 0) > 0


def test_a_configuration_does_not_drift_from_itself(stub_vlm: EdgeVLM) -> None:
    known = drift.answers(stub_vlm, [CASE], max_tokens=5)
    found = drift.against(stub_vlm, known, max_tokens=5)[0]
    assert found.tokens == 5
    assert found.first_divergence is None
    assert found.equal_greedy == 1.0
    assert found.max_abs_dlogprob < 1e-3
    assert found.max_kl < 1e-3
