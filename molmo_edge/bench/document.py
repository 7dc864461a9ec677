"""The result of a benchmark: one JSON document and its file.

Times are seconds, sizes bytes, speeds tokens per second, energies joules, powers watts. ``null``
always means "unknown", never zero.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from molmo_edge.errors import BenchmarkError
from molmo_edge.files import write_file

Scalar = str | int | float | bool | None
Stop = Literal["narrow", "cap", "time", "fixed", "interrupted", "error"]
"""Why a row ended; see ``stats.RULES``. Cold starts have a fixed number, and so have concurrent
users unless time ends them."""


class Part(BaseModel):
    """Base of all parts of a document: no NaN or infinity. Unknown keys, which other versions of
    the package may have written, are ignored."""

    model_config = ConfigDict(allow_inf_nan=False)


class Device(Part):
    """What the numbers were produced on: fields of ``devices.detect.DeviceInfo``.

    Bandwidth is the published peak, the power limit the one enforced, clocks (current, maximum)
    in MHz.
    """

    name: str | None = None
    kind: str | None = None
    memory_total_bytes: int | None = None
    memory_bandwidth_bytes_s: float | None = None
    power_mode: str | None = None
    power_limit_w: float | None = None
    clocks: dict[str, tuple[int | None, int | None]] = Field(default_factory=dict)
    cpu_governor: str | None = None
    cpu_count: int | None = None
    driver: str | None = None
    cuda: str | None = None
    machine: str | None = None
    in_container: bool | None = None


class Model(Part):
    """Which weights, in which form, under which engine settings."""

    name: str | None = None
    random_weights: bool | None = None
    load_format: str | None = None
    precision: str | None = None
    kv_cache_dtype: str | None = None
    dtype: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_crops: int | None = None
    profile: str | None = None


class Environment(Part):
    """``software`` maps packages, and "python", to versions; ``other`` keeps what has no field."""

    software: dict[str, str | None] = Field(default_factory=dict)
    device: Device = Field(default_factory=Device)
    model: Model = Field(default_factory=Model)
    other: dict[str, Scalar] = Field(default_factory=dict)


class Sample(Part):
    """One request. ``itl_s`` holds one latency per output token after the first, ``prompt_tps`` is
    the prompt's computed tokens over ``prefill_s``, which includes the vision tower."""

    iteration: int
    wall_s: float | None = None
    queue_s: float | None = None
    preprocess_s: float | None = None
    prefill_s: float | None = None
    ttft_s: float | None = None
    itl_s: list[float] = Field(default_factory=list)
    tpot_s: float | None = None
    e2e_s: float | None = None
    prompt_tokens: int | None = None
    image_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    prompt_tps: float | None = None
    output_tps: float | None = None
    request_tps: float | None = None
    finish_reason: str | None = None
    error: str | None = None


class Wave(Part):
    iteration: int
    wall_s: float
    output_tokens: int
    total_tps: float


class Summary(Part):
    """A series in numbers; see ``molmo_edge.bench.stats.summarize``."""

    n: int | None = None
    mean: float | None = None
    median: float | None = None
    std: float | None = None
    min: float | None = None
    max: float | None = None
    p90: float | None = None
    p99: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None


class Warmup(Part):
    """Where the steady state begins; ``start`` is null when the speed never settled."""

    start: int | None
    slowed: bool


class CacheProof(Part):
    """Whether reuse could have flattered the row.

    ``cached_tokens`` are the most that the engine took from its cache in any request. ``proved`` is
    whether that agrees with ``mode``, which the row claims; null if the engine did not count.
    """

    mode: Literal["on", "off"]
    cached_tokens: int | None = None
    proved: bool | None = None


class Ceiling(Part):
    """How near decode comes to what the memory allows, and what the row cost.

    Watts are the mean over the row. Joules per token are the row's energy over its output tokens,
    prefill included. ``throttled``: power or heat held the clocks down at some time of the row.
    """

    bytes_per_token: float | None = None
    bandwidth_share: float | None = None
    watts: float | None = None
    joules_per_token: float | None = None
    gpu_mhz: float | None = None
    throttled: bool | None = None


class Answer(Part):
    """The last answer, and how many of the values known to be right it holds, in order."""

    text: str
    expected: list[str] = Field(default_factory=list)
    matched: int | None = None


class Row(Part):
    """One series measured under one set of conditions."""

    name: str
    title: str
    conditions: dict[str, Scalar] = Field(default_factory=dict)
    prompt: str | None = None
    stopped: Stop | None = None
    error: str | None = None
    samples: list[Sample] = Field(default_factory=list)
    waves: list[Wave] = Field(default_factory=list)
    counts: dict[str, float | None] = Field(default_factory=dict)
    warmup: Warmup | None = None
    all: dict[str, Summary] = Field(default_factory=dict)
    cold: dict[str, Summary] = Field(default_factory=dict)
    steady: dict[str, Summary] = Field(default_factory=dict)
    caches: CacheProof | None = None
    ceiling: Ceiling | None = None
    answer: Answer | None = None

    def summary(self, metric: str) -> Summary:
        """The steady state's summary, or that of all iterations where the row never settled."""
        return (self.steady or self.all).get(metric, Summary())

    @property
    def rates(self) -> dict[str, Summary]:
        """Prompt and generation rate, named as llama-bench names them: pp512, tg128."""
        measured = {"pp": ("prompt_tokens", "prompt_tps"), "tg": ("output_tokens", "output_tps")}
        rates = {}
        for name, (count, rate) in measured.items():
            counts = {getattr(sample, count) for sample in self.succeeded}
            if len(counts) == 1 and self.summary(rate).mean is not None:
                rates[f"{name}{counts.pop()}"] = self.summary(rate)
        return rates

    @property
    def succeeded(self) -> list[Sample]:
        return [sample for sample in self.samples if sample.error is None]

    @property
    def steady_from(self) -> int | None:
        return self.warmup.start if self.warmup else None

    @property
    def unsteady(self) -> str | None:
        """What is wrong with the steady state, if anything."""
        if not self.samples or self.warmup is None or "disk_caches" in self.conditions:
            return None
        if self.warmup.start is None:
            return "never became steady"
        return "slowed down during the measurement" if self.warmup.slowed else None

    def is_steady(self, sample: Sample) -> bool | None:
        """Whether a sample is of the steady state; None where the row never settled."""
        return None if self.steady_from is None else sample.iteration >= self.steady_from


class Scenario(Part):
    name: str
    title: str
    complete: bool = False
    error: str | None = None
    rows: list[Row] = Field(default_factory=list)


class Startup(Part):
    stages: dict[str, float | None] = Field(default_factory=dict)
    first_request: Sample | None = None


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class Document(Part):
    format: Literal["molmo-edge-bench"] = "molmo-edge-bench"
    version: Literal[1] = 1
    label: str | None = None
    created: str
    complete: bool = False
    notes: list[str] = Field(default_factory=list)
    rules: dict[str, str] = Field(default_factory=dict)
    environment: Environment = Field(default_factory=Environment)
    settings: dict[str, Any] = Field(default_factory=dict)
    startup: Startup | None = None
    scenarios: list[Scenario] = Field(default_factory=list)


def dumps(document: Part) -> str:
    return document.model_dump_json(indent=1) + "\n"


def write(content: str | bytes, path: Path) -> None:
    """Replace a file atomically; BenchmarkError if the directory cannot be made or written."""
    try:
        write_file(path, content)
    except OSError as exc:
        raise BenchmarkError(
            f"cannot write {path}: {exc.strerror or 'input/output error'}; "
            "choose a writable place with --output"
        ) from exc


def save(document: Part, page: str, path: Path) -> None:
    """Write the document, and its Markdown page beside it."""
    write(dumps(document), path)
    write(page, path.with_suffix(".md"))


def result_path(output: Path, label: str) -> Path:
    """``output`` if it is a ``.json`` file, else a file in that directory named by time and label.

    Raises BenchmarkError if it cannot be written: better known before a long run than after.
    """
    name = re.sub(r"[^A-Za-z0-9.]+", "-", label).strip("-.")[:60] or "result"
    stamp = datetime.now(UTC).strftime("%Y-%m-%d-%H%M%S")
    path = output if output.suffix == ".json" else output / f"{stamp}-{name}.json"
    probe = path.with_name(f".{path.name}.probe")
    write("", probe)
    probe.unlink(missing_ok=True)
    return path


def load(path: Path) -> Document:
    """Read a result; BenchmarkError if the file is unreadable or not one of this format."""
    try:
        return Document.model_validate_json(path.read_bytes())
    except OSError as exc:
        raise BenchmarkError(f"cannot read {path}: {exc.strerror or 'input/output error'}") from exc
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the top"
        raise BenchmarkError(
            f"{path} is not a result of `molmo-edge bench` that this version reads: at {where}: "
            f"{first['msg']}"
        ) from exc
