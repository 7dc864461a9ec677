"""Foreign exceptions become ours, whatever they are, and say nothing they should not."""

from __future__ import annotations

import importlib
import inspect
import traceback
from collections.abc import Iterator

import pytest
from pydantic import BaseModel, ValidationError

from molmo_edge.engine.vllm_errors import FOREIGN, Stage, advice, drop_frames, mapped
from molmo_edge.errors import (
    ConfigError,
    EngineStartError,
    GenerationError,
    InputError,
    MissingDependencyError,
    ModelError,
    MolmoEdgeError,
    PromptError,
    QueueFull,
)

STAGES: tuple[Stage, ...] = ("build", "render", "add")
SECRET = "my prompt <object at 0x7f0000001234>"


def ours(exc: BaseException, stage: Stage) -> MolmoEdgeError:
    with pytest.raises(MolmoEdgeError) as caught, mapped(stage):
        raise exc
    return caught.value


def test_our_own_errors_and_what_is_no_error_pass() -> None:
    own = PromptError("mine")
    assert ours(own, "add") is own
    for other in (KeyboardInterrupt, SystemExit, GeneratorExit):
        with pytest.raises(other), mapped("render"):
            raise other


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "kind", [ValueError, TypeError, RuntimeError, OSError, KeyError, AssertionError, MemoryError]
)
def test_any_exception_is_mapped_chained_and_told_in_our_words(
    kind: type[Exception], stage: Stage
) -> None:
    exc = kind(SECRET)
    error = ours(exc, stage)
    assert error.__cause__ is exc
    assert kind.__name__ in str(error)
    assert "prompt <" not in str(error) and "0x" not in str(error)


@pytest.mark.parametrize(
    ("said", "kind", "hint"),
    [
        ("No available memory for the cache blocks. Try increasing x", EngineStartError, "kv_cache_memory_gb"),  # noqa: E501
        (
            "To serve at least one request with the model's max seq len (4096), (2 GiB KV cache is "
            "needed, which is larger than the available KV cache memory (1 GiB).",
            EngineStartError,
            "max_model_len",
        ),
        (
            "Free memory on device cuda:0 (1/16 GiB) on startup is less than desired GPU memory "
            "utilization (0.9, 14 GiB).",
            EngineStartError,
            "gpu_memory_utilization",
        ),
        (
            "Available memory on node 0 (1/4 GiB) on startup is less than desired CPU memory",
            EngineStartError,
            "gpu_memory_utilization",
        ),
        ("DefaultCPUAllocator: can't allocate memory: you tried 1 bytes", EngineStartError, "memory"),  # noqa: E501
        ("CUDA out of memory. Tried to allocate 2 GiB", EngineStartError, "precision"),
        (
            "User-specified max_model_len (99999) is greater than the derived max_model_len",
            ConfigError,
            "max_model_len",
        ),
        ("Selected backend X is not valid for this configuration.", ConfigError, "backend"),
        ("Unknown attention backend: 'FOO'", ConfigError, "backend"),
        ("torch.float16 is not supported for quantization method x", ConfigError, "precision"),
        ("Bfloat16 is only supported on GPUs with compute capability", ConfigError, "dtype"),
        ("Load format `foo` is not supported", ConfigError, "load_format"),
        ("Cannot re-initialize CUDA in forked subprocess.", EngineStartError, "spawn"),
    ],
)
def test_a_start_that_fails_says_what_to_do(
    said: str, kind: type[MolmoEdgeError], hint: str
) -> None:
    for foreign in (ValueError, RuntimeError):
        error = ours(foreign(said), "build")
        assert type(error) is kind
        assert hint in str(error)
        assert f"The chained {foreign.__name__} says more." in str(error)


def test_the_reason_is_found_behind_a_general_failure() -> None:
    outer = RuntimeError("Engine core initialization failed. See root cause above.")
    outer.__cause__ = ValueError("No available memory for the cache blocks.")
    assert "KV cache" in str(ours(outer, "build"))


def test_a_missing_package_is_named() -> None:
    error = ours(ModuleNotFoundError("No module named 'torchvision'", name="torchvision"), "build")
    assert type(error) is MissingDependencyError
    assert "torchvision" in str(error)


def test_memory_that_ran_out_is_told_as_such() -> None:
    class OutOfMemoryError(RuntimeError):
        """As torch's, by name."""

    oom = OutOfMemoryError("CUDA out of memory. Tried to allocate 0x10")
    assert type(ours(oom, "build")) is EngineStartError
    assert "max_crops" in str(ours(oom, "add"))
    assert "max_num_seqs" in advice(oom)
    assert advice(ValueError("x")) == ""


def test_pydantic_errors_are_the_callers_mistake() -> None:
    class Model(BaseModel):
        a: int

    with pytest.raises(ValidationError) as caught:
        Model(a="no")  # type: ignore[arg-type]
    assert type(ours(caught.value, "build")) is ConfigError
    assert type(ours(caught.value, "add")) is InputError


def test_dropped_frames_free_what_their_variables_held() -> None:
    def fails() -> None:
        heavy = bytearray(10)
        try:
            raise ValueError("inner")
        except ValueError as exc:
            raise RuntimeError(len(heavy)) from exc

    try:
        fails()
    except RuntimeError as exc:
        drop_frames(exc)
        assert exc.__traceback__ is not None
        assert exc.__traceback__.tb_frame.f_locals == {}
        assert exc.__cause__ is not None
        assert "fails" in "".join(traceback.format_exception(exc))


# vLLM's own classes; importing them takes seconds.

_MODULES = (
    "vllm.exceptions",
    "vllm.v1.engine.exceptions",
    "vllm.multimodal.cache.base",
    "vllm.renderers.chat_utils",
)
# Modules a request or a start goes through that define no class of their own today.
_QUIET = (
    "vllm.sampling_params",
    "vllm.inputs.engine",
    "vllm.v1.engine.input_processor",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.engine.core",
    "vllm.v1.core.kv_cache_utils",
    "vllm.v1.structured_output",
    "vllm.multimodal.inputs",
    "vllm.config",
)


def foreign_classes() -> Iterator[type[Exception]]:
    for name in (*_MODULES, *_QUIET):
        for _, kind in inspect.getmembers(importlib.import_module(name), inspect.isclass):
            if issubclass(kind, Exception) and kind.__module__.startswith("vllm"):
                yield kind


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_exception_class_of_vllm_is_mapped() -> None:
    pytest.importorskip("vllm")
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in foreign_classes()}
    assert names, "vLLM has moved its exceptions"
    assert sorted(names - set(FOREIGN)) == [], "decide what these mean, in engine/errors_map.py"
    gone = {name for name in FOREIGN if name.startswith("vllm.")} - names
    assert sorted(gone) == [], "vLLM has these no more"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_vllms_classes_become_the_right_ones_of_ours() -> None:
    pytest.importorskip("vllm")
    from vllm.exceptions import QueueOverflowError, VLLMServerError, VLLMValidationError
    from vllm.v1.engine.exceptions import EngineGenerateError

    wrong = VLLMValidationError(SECRET, parameter="top_p", value=SECRET)
    assert type(ours(wrong, "add")) is InputError
    assert "top_p" in str(ours(wrong, "add")) and "prompt <" not in str(ours(wrong, "add"))
    assert type(ours(QueueOverflowError(), "add")) is QueueFull
    assert type(ours(VLLMServerError("x"), "add")) is GenerationError
    assert type(ours(EngineGenerateError("x"), "add")) is GenerationError


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_torchs_and_safetensors_classes_are_where_the_table_says() -> None:
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors")
    assert type(ours(torch.OutOfMemoryError("no"), "build")) is EngineStartError
    assert "memory" in str(ours(torch.OutOfMemoryError("no"), "build"))
    assert type(ours(safetensors.SafetensorError("x"), "build")) is ModelError
    for name in FOREIGN:
        module, _, kind = name.rpartition(".")
        if not module.startswith("vllm"):
            assert issubclass(getattr(importlib.import_module(module), kind), Exception)
