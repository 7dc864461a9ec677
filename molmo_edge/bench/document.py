"""The result of a benchmark: one JSON document, and its schema.

The published schema is ``molmo_edge/bench/data/result.schema.json`` (``python -m
molmo_edge.bench schema`` prints it); it is generated from the models below. Times are seconds,
sizes bytes, speeds tokens a second, energies joules, powers watts. ``null`` always means
"unknown", never zero.

This module knows nothing about how anything is measured, stored or shown.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

FORMAT = "molmo-edge-bench"
VERSION = 1

Scalar = str | int | float | bool | None
Stop = Literal["narrow", "cap", "time", "short", "fixed", "interrupted", "error"]
"""Why a row ended; "short": the time limit came before the least number of iterations."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Software(_Part):
    """What produced the numbers."""

    molmo_edge: str | None = None
    vllm: str | None = None
    torch: str | None = None
    transformers: str | None = None
    python: str | None = None


class Device(_Part):
    """What the numbers were produced on. Bandwidth is the published peak; clocks are in MHz."""

    name: str | None = None
    kind: str | None = None
    memory_bytes: int | None = None
    bandwidth_bytes_per_s: float | None = None
    power_mode: str | None = None
    power_limit_w: float | None = None
    clocks_mhz: dict[str, int | None] = Field(default_factory=dict)
    clocks_max_mhz: dict[str, int | None] = Field(default_factory=dict)
    cpu_governor: str | None = None
    cpu_count: int | None = None
    driver: str | None = None
    cuda: str | None = None
    machine: str | None = None
    in_container: bool | None = None


class Model(_Part):
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


class Environment(_Part):
    """Everything about the run that is not the measurement; ``other`` keeps what has no field."""

    software: Software = Field(default_factory=Software)
    device: Device = Field(default_factory=Device)
    model: Model = Field(default_factory=Model)
    other: dict[str, Scalar] = Field(default_factory=dict)


class Settings(_Part):
    """What was asked for."""

    iterations: int | None = None
    max_iterations: int | None = None
    time_limit_s: float | None = None
    max_tokens: int | None = None
    ignore_eos: bool | None = None
    temperature: float | None = None
    seed: int | None = None
    confidence: float | None = None
    interval_width: float | None = None


class Sample(_Part):
    """One request. ``itl_s`` holds one latency per output token after the first."""

    iteration: int
    started_s: float | None = None
    user: int | None = None
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
    output_tps: float | None = None
    request_tps: float | None = None
    energy_j: float | None = None
    finish_reason: str | None = None
    error: str | None = None


class Wave(_Part):
    """One batch, or one stretch of concurrent load, as a whole."""

    iteration: int
    wall_s: float
    requests: int
    failed: int
    output_tokens: int
    total_tps: float


class Summary(_Part):
    """A series in numbers; see ``molmo_edge.bench.stats.Summary``."""

    n: int | None = None
    mean: float | None = None
    median: float | None = None
    std: float | None = None
    min: float | None = None
    max: float | None = None
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    confidence: float | None = None


class Level(_Part):
    """A stretch of iterations with one speed."""

    start: int
    median: float


class Warmup(_Part):
    """Where the steady state begins; ``start`` is null when the speed never settled."""

    start: int | None
    levels: list[Level]
    slowed: bool


class CacheProof(_Part):
    """Whether reuse could have flattered the row.

    ``cached_tokens`` is the largest count of prompt tokens the engine took from its cache in
    any request, ``fresh_images`` says that no picture was shown twice. ``proved`` is true if
    both bear out what the row claims, and null if the engine did not count.
    """

    mode: Literal["on", "off"]
    cached_tokens: int | None = None
    fresh_images: bool | None = None
    proved: bool | None = None


class Ceiling(_Part):
    """How near decode comes to what the memory allows, and what it costs.

    Watts, joules and tokens a second a watt are of decode alone at batch 1, of the whole row
    otherwise; ``row_joules_per_token`` is always of the whole row, prefill included.
    ``throttled``: power or heat held the clocks down at some time of the row.
    """

    bytes_per_token: float | None = None
    bandwidth_share: float | None = None
    ceiling_tps: float | None = None
    watts: float | None = None
    joules_per_token: float | None = None
    tps_per_watt: float | None = None
    row_joules_per_token: float | None = None
    gpu_mhz: float | None = None
    throttled: bool | None = None


class Picture(_Part):
    """The picture asked about, before any per-iteration change. ``sha256`` is of its pixels."""

    name: str
    width: int
    height: int
    sha256: str | None = None


class Answer(_Part):
    """The last answer, and how many of the values known to be right it holds, in order."""

    text: str
    expected: list[str] = Field(default_factory=list)
    matched: int | None = None


class Row(_Part):
    """One series measured under one set of conditions."""

    name: str
    title: str
    conditions: dict[str, Scalar] = Field(default_factory=dict)
    prompt: str | None = None
    image: Picture | None = None
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


class Scenario(_Part):
    """One kind of measurement."""

    name: str
    title: str
    complete: bool = False
    error: str | None = None
    rows: list[Row] = Field(default_factory=list)


class Startup(_Part):
    """From nothing to the first answer; stages as the engine reports them."""

    stages: dict[str, float | None] = Field(default_factory=dict)
    first_request: Sample | None = None


class Document(_Part):
    """A whole benchmark result."""

    format: Literal["molmo-edge-bench"] = "molmo-edge-bench"
    version: Literal[1] = 1
    kind: Literal["measured", "historic"] = "measured"
    label: str | None = None
    created: str
    complete: bool = False
    source: str | None = None
    notes: list[str] = Field(default_factory=list)
    rules: dict[str, str] = Field(default_factory=dict)
    environment: Environment = Field(default_factory=Environment)
    settings: Settings = Field(default_factory=Settings)
    startup: Startup | None = None
    scenarios: list[Scenario] = Field(default_factory=list)


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a result document."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"{FORMAT} result, version {VERSION}",
        **{k: v for k, v in Document.model_json_schema().items() if k != "title"},
    }
