"""The parts of an engine's start: what is timed, what stays unknown, what is put back."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from molmo_edge.engine import stages
from molmo_edge.engine.stages import watched

LOADER = "vllm.model_executor.model_loader.base_loader"
EXECUTOR = "vllm.v1.executor.uniproc_executor"
UNKNOWN = {"weights": None, "compile": None, "profile": None, "warmup": None}


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stages, "time", clock)
    return clock


@pytest.fixture
def vllm(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The two classes of vLLM, whose work takes as long as they are told."""

    class BaseModelLoader:
        def load_model(self, seconds: float, *, fails: bool = False) -> str:
            clock.now += seconds
            if fails:
                raise OSError("no weights")
            return "model"

    class UniProcExecutor:
        def __init__(self) -> None:
            times = SimpleNamespace(compilation_time=0.0, encoder_compilation_time=0.0, mode=3)
            self.vllm_config = SimpleNamespace(compilation_config=times)

        def collective_rpc(self, method: Any, seconds: float, *, compiling: float = 0.0) -> str:
            clock.now += seconds
            if compiling:
                self.vllm_config.compilation_config.compilation_time += compiling / 2
                self.vllm_config.compilation_config.encoder_compilation_time += compiling / 2
            return f"did {method}"

    for name, cls in ((LOADER, BaseModelLoader), (EXECUTOR, UniProcExecutor)):
        module = ModuleType(name)
        setattr(module, cls.__name__, cls)
        monkeypatch.setitem(sys.modules, name, module)
    return SimpleNamespace(loader=BaseModelLoader, executor=UniProcExecutor)


def test_each_part_has_its_own_seconds(vllm: Any) -> None:
    with watched() as seen:
        executor = vllm.executor()
        assert vllm.loader().load_model(5.0) == "model"
        assert vllm.loader().load_model(seconds=1.0) == "model"  # a drafter's
        assert executor.collective_rpc("determine_available_memory", 10.0, compiling=7.0)
        executor.collective_rpc("initialize_from_config", 2.0)
        executor.collective_rpc("compile_or_warm_up_model", 4.0)
        assert executor.collective_rpc("get_kv_cache_spec", 100.0) == "did get_kv_cache_spec"
        executor.collective_rpc(lambda worker: None, 100.0)
    assert seen.seconds() == {"weights": 6.0, "compile": 7.0, "profile": 5.0, "warmup": 4.0}


def test_without_compiling_it_took_no_time_which_is_known(vllm: Any) -> None:
    with watched() as seen:
        executor = vllm.executor()
        executor.vllm_config.compilation_config.mode = 0
        executor.collective_rpc("determine_available_memory", 3.0)
    assert seen.seconds() == {**UNKNOWN, "compile": 0.0, "profile": 3.0}


def test_compiling_that_nobody_counts_is_unknown(vllm: Any) -> None:
    with watched() as seen:
        vllm.executor().collective_rpc("determine_available_memory", 30.0)
    assert seen.seconds() == {**UNKNOWN, "profile": 30.0}


def test_a_vllm_that_does_not_count_compiling_leaves_it_unknown(vllm: Any) -> None:
    executor = vllm.executor()
    del executor.vllm_config.compilation_config.compilation_time
    with watched() as seen:
        executor.collective_rpc("determine_available_memory", 3.0, compiling=0.0)
    assert seen.seconds() == {**UNKNOWN, "profile": 3.0}


def test_vllm_is_left_as_it_was_also_by_a_failing_start(vllm: Any) -> None:
    before = vllm.loader.load_model, vllm.executor.collective_rpc
    with pytest.raises(OSError, match="no weights"), watched() as seen:
        assert vllm.loader.load_model is not before[0]
        vllm.loader().load_model(2.0, fails=True)
    assert (vllm.loader.load_model, vllm.executor.collective_rpc) == before
    assert seen.seconds()["weights"] == 2.0


@pytest.mark.parametrize("missing", ["module", "class", "method"])
def test_another_vllm_leaves_everything_unknown(
    vllm: Any, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, cls, method in (
        (LOADER, vllm.loader, "load_model"),
        (EXECUTOR, vllm.executor, "collective_rpc"),
    ):
        if missing == "module":
            monkeypatch.setitem(sys.modules, name, None)
        elif missing == "class":
            delattr(sys.modules[name], cls.__name__)
        else:
            delattr(cls, method)
    with watched() as seen:
        pass
    assert seen.seconds() == UNKNOWN
