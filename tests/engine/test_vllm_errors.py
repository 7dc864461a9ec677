"""Third-party exceptions become ours, by class, and the messages quote nothing."""

from __future__ import annotations

import importlib
import logging

import pytest

from molmo_edge.engine.vllm_errors import TABLE, Stage, advice, mapped
from molmo_edge.errors import (
    ConfigError,
    EngineStartError,
    GenerationError,
    InputError,
    MissingDependencyError,
    ModelError,
    MolmoEdgeError,
    PromptError,
)

SECRET = "my prompt <object at 0x7f0000001234>"


def translate(exc: BaseException, stage: Stage) -> MolmoEdgeError:
    with pytest.raises(MolmoEdgeError) as caught, mapped(stage):
        raise exc
    return caught.value


def test_our_own_errors_and_interrupts_pass() -> None:
    own = PromptError("mine")
    assert translate(own, "add") is own
    with pytest.raises(KeyboardInterrupt), mapped("render"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("stage", ["build", "render", "add"])
@pytest.mark.parametrize("kind", [ValueError, TypeError, RuntimeError, KeyError, MemoryError])
def test_any_exception_is_translated_and_chained_without_its_message(
    kind: type[Exception], stage: Stage
) -> None:
    exc = kind(SECRET)
    error = translate(exc, stage)
    assert error.__cause__ is exc
    assert kind.__name__ in str(error)
    assert "prompt <" not in str(error) and "0x" not in str(error)


def test_the_log_quotes_why_an_engine_did_not_start(caplog: pytest.LogCaptureFixture) -> None:
    error = translate(ValueError("No available memory for the cache blocks."), "build")
    assert type(error) is EngineStartError
    assert "No available memory for the cache blocks." in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        translate(ValueError(SECRET), "add")
    assert not caplog.text  # may quote the prompt


def test_a_missing_package_is_named() -> None:
    error = translate(ModuleNotFoundError("no torchvision", name="torchvision"), "build")
    assert type(error) is MissingDependencyError
    assert "torchvision" in str(error)


def test_out_of_memory_comes_with_advice() -> None:
    torch = pytest.importorskip("torch")
    for oom in (torch.OutOfMemoryError("CUDA: 0x10"), MemoryError()):
        assert type(translate(oom, "build")) is EngineStartError
        assert "max_model_len" in str(translate(oom, "build"))
        assert type(translate(oom, "add")) is GenerationError
        assert "max_crops" in str(translate(oom, "add"))
        outer = RuntimeError("the engine died")
        outer.__cause__ = oom
        assert "max_num_seqs" in advice(outer)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_class_of_the_table_exists_and_means_what_it_says() -> None:
    pytest.importorskip("vllm")
    for name in TABLE:
        module, _, kind = name.rpartition(".")
        assert issubclass(getattr(importlib.import_module(module), kind), Exception)
    from safetensors import SafetensorError
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.exceptions import EngineDeadError

    wrong = VLLMValidationError(SECRET, parameter="top_p", value=SECRET)
    assert type(translate(wrong, "add")) is InputError
    assert type(translate(wrong, "build")) is ConfigError
    assert "prompt <" not in str(translate(wrong, "add"))
    assert type(translate(EngineDeadError(), "add")) is GenerationError
    assert type(translate(SafetensorError("x"), "build")) is ModelError
