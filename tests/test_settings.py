"""Settings: the order of sources, the source of each value, and what is refused."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

import molmo_edge
from molmo_edge.errors import ConfigError
from molmo_edge.settings import EdgeSettings, Origin, resolve

CONFIGS = Path(__file__).parents[1] / "configs"
PROFILES = Path(molmo_edge.__file__).parent / "devices" / "profiles"


def refusal(config: Path | str | None = None, /, **arguments: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(arguments, config=config)
    return str(caught.value)


def write_toml(text: str, name: str = "robot.toml") -> Path:
    Path(name).write_text(text)
    return Path(name)


def as_profile(values: dict[str, Any]) -> Any:
    return lambda name: ("thor", values)


def test_each_source_beats_all_below_it(monkeypatch: pytest.MonkeyPatch) -> None:
    sources: dict[str, Any] = {"config": None, "profile_settings": None}

    def check(value: int, origin: str, **arguments: int | None) -> None:
        resolved = resolve(arguments, **sources)
        assert resolved.settings.max_num_seqs == value
        assert resolved.origins["max_num_seqs"] == origin
        assert ("max_num_seqs" in resolved.by_user) is (origin not in ("default", "profile"))

    check(8, "default")
    sources["profile_settings"] = as_profile({"max_num_seqs": 2})
    check(2, "profile")
    sources["config"] = write_toml("max_num_seqs = 3\n")
    check(3, "config")
    Path(".env").write_text("MOLMO_EDGE_MAX_NUM_SEQS=4\n")
    check(4, ".env")
    monkeypatch.setenv("MOLMO_EDGE_MAX_NUM_SEQS", "5")
    check(5, "environment")
    check(6, "argument", max_num_seqs=6)
    for text in ("", "none", "None"):  # not given
        monkeypatch.setenv("MOLMO_EDGE_MAX_NUM_SEQS", text)
        check(4, ".env", max_num_seqs=None)


def test_without_any_source_every_value_is_a_default_and_frozen() -> None:
    resolved = resolve({})
    assert resolved.origins == dict.fromkeys(EdgeSettings.model_fields, Origin.DEFAULT)
    assert resolved.settings == EdgeSettings() and resolved.profile_name is None
    with pytest.raises(ValidationError):
        resolved.settings.seed = 3


def test_engine_args_merge_key_by_key_and_each_key_has_its_source(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MOLMO_EDGE_ENGINE_ARGS", '{"a": 2, "b": [2], "c": null}')
    Path(".env").write_text('MOLMO_EDGE_ENGINE_ARGS=\'{"b": 3, "d": true}\'\n')
    config = write_toml("[engine_args]\nd = 4\n[engine_args.e]\nx = 4\n")
    profile = as_profile({"engine_args": {"e": {"y": 5}, "f": 5}})
    resolved = resolve({"engine_args": {"a": 1}}, config=config, profile_settings=profile)
    assert resolved.settings.engine_args == {
        "a": 1, "b": [2], "c": None, "d": True, "e": {"x": 4}, "f": 5,
    }  # fmt: skip
    assert [resolved.origins[f"engine_args.{key}"] for key in "abcdef"] == [
        "argument", "environment", "environment", ".env", "config", "profile",
    ]  # fmt: skip
    assert "engine_args" not in resolved.origins


@pytest.mark.parametrize(
    ("key", "setting"),
    [
        ("kv_cache_dtype", "kv_cache_dtype"),
        ("quantization", "precision"),
        ("kv_cache_memory_bytes", "kv_cache_memory_gb"),
    ],
)
def test_engine_args_cannot_contradict_a_setting(key: str, setting: str) -> None:
    assert f"set {setting} itself" in refusal(engine_args={key: "fp8"})
    config = write_toml(f'[engine_args]\n{key} = "auto"\n')
    assert f"config robot.toml: engine_args must not contain {key}" in refusal(config)


def test_a_config_file_may_be_named_by_argument_environment_or_dotenv(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for number in (1, 2, 3):
        write_toml(f"max_num_seqs = {number}\n", f"{number}.toml")
    Path(".env").write_text("MOLMO_EDGE_CONFIG=3.toml\n")
    assert resolve({}).settings.max_num_seqs == 3
    monkeypatch.setenv("MOLMO_EDGE_CONFIG", "2.toml")
    assert resolve({}).settings.max_num_seqs == 2
    assert resolve({}, config="1.toml").settings.max_num_seqs == 1


def test_the_profile_is_looked_up_once_by_the_name_the_highest_source_gave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requested = []

    def look_up(name: str) -> tuple[str, Mapping[str, Any]]:
        requested.append(name)
        return "thor", {"max_num_seqs": 2}

    resolved = resolve({}, profile_settings=look_up)
    assert (resolved.settings.profile, resolved.profile_name) == ("auto", "thor")
    monkeypatch.setenv("MOLMO_EDGE_PROFILE", "spark")
    config = write_toml('profile = "orin"\n')
    resolve({}, config=config, profile_settings=look_up)
    resolve({"profile": "cpu"}, config=config, profile_settings=look_up)
    assert requested == ["auto", "spark", "cpu"]


def test_an_unknown_name_in_any_source_is_refused_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unknown(label: str, name: str, near: str, prefix: str = "") -> str:
        hint = f" Did you mean {prefix}{near}?" if near else ""
        args = f"{prefix}ENGINE_ARGS" if prefix else "engine_args"
        return f"{label}: {prefix}{name} is unknown.{hint} vLLM's own arguments belong in {args}."

    for name, near in {
        "max_model_length": "max_model_len",
        "trust_remote_code": "",
        "limit_mm_per_prompt": "",
    }.items():
        assert refusal(**{name: 1}) == unknown("argument", name, near)
    with monkeypatch.context() as patch:
        patch.setenv("MOLMO_EDGE_MODELL", "stub")
        assert refusal() == unknown("environment", "MODELL", "MODEL", "MOLMO_EDGE_")
    Path(".env").write_text("A=1\nMOLMO_EDGE_PERCISION=fp8\n")
    assert refusal() == unknown(".env", "PERCISION", "PRECISION", "MOLMO_EDGE_")
    Path(".env").unlink()
    config = write_toml("[enginee_args]\na = 1\n")
    assert refusal(config) == unknown("config robot.toml", "enginee_args", "engine_args")
    with pytest.raises(ConfigError, match="profile thor: max-num-seqs is unknown"):
        resolve({}, profile_settings=as_profile({"max-num-seqs": 3}))
    assert "set precision" in refusal(quantization="fp8")
    for option in ("max_tokens", "temperature", "timeout"):
        assert f"{option} is an option of a request" in refusal(**{option: 1})


def test_variables_of_kubernetes_and_compose_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT", "PORT_80_TCP",
        "PORT_80_TCP_ADDR", "PORT_53_UDP_PROTO", "VLM_SERVICE_HOST", "VLM_PORT_80_TCP_PORT",
        "VLM_SERVICE_PORT_HTTP",
    ):  # fmt: skip
        monkeypatch.setenv(f"MOLMO_EDGE_{name}", "tcp://10.0.0.7:80")
    assert resolve({}).settings == EdgeSettings()
    monkeypatch.setenv("MOLMO_EDGE_SERVICE", "x")
    assert "MOLMO_EDGE_SERVICE is unknown" in refusal()


def test_numpy_scalars_are_numbers() -> None:
    given = {"max_num_seqs": np.int64(2), "stall_s": np.float32(2), "enforce_eager": np.bool_(True)}
    settings = resolve(given).settings
    assert (settings.max_num_seqs, settings.stall_s, settings.enforce_eager) == (2, 2.0, True)
    assert type(settings.max_num_seqs) is int
    assert "max_num_seqs should be a valid integer" in refusal(max_num_seqs=np.float64(2))
    assert "seed" in refusal(seed=np.arange(2))


def test_a_value_is_checked_even_where_a_higher_source_hides_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert refusal(max_crops=99, model=3).splitlines() == [
        "argument: model should be a valid string; got 3",
        "argument: max_crops should be less than or equal to 32; got 99",
    ]
    assert "config robot.toml: seed should" in refusal(write_toml("seed = true\n"), seed=1)
    Path(".env").write_text("MOLMO_EDGE_SEED=inf\n")
    assert ".env: MOLMO_EDGE_SEED should be a valid integer" in refusal(seed=1)
    monkeypatch.setenv("MOLMO_EDGE_SEED", "x")
    assert "environment: MOLMO_EDGE_SEED should be a valid integer" in refusal(seed=1)


@pytest.mark.parametrize(
    ("name", "refused", "taken"),
    [
        ("max_model_len", [63, -1], [64]),
        ("max_num_seqs", [0, 1025, True, 2.0, "8", [8]], [1, 1024]),
        ("max_crops", [0, 33], [1, 32]),
        ("seed", [-1, 2**32], [0, 2**32 - 1]),
        ("gpu_memory_utilization", [0, 1.01, 10**400, math.nan, "0.5"], [0.01, 1]),
        ("kv_cache_memory_gb", [0, math.inf], [0.1]),
        ("precision", [1, "int8"], ["fp8"]),
        ("enforce_eager", [1, "perhaps"], [True]),
        ("cache_dir", ["~nobody-has-this-name/x", 3, True], [Path("/data")]),
        ("model", ["", " ", "\udc80", 3], ["path/to/checkpoint"]),
        ("attention_backend", ["", 3], ["TRITON_ATTN"]),
        ("engine_args", [{3: 4}, "a=1", [("a", 1)]], [{"a": object}]),
    ],
)
def test_ranges(name: str, refused: list[Any], taken: list[Any]) -> None:
    for value in refused:
        assert refusal(**{name: value}).startswith(f"argument: {name} ")
    for value in taken:
        assert getattr(resolve({name: value}).settings, name) == value


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("max_image_pixels", "1_000_000", 1_000_000),
        ("stall_s", "30", 30.0),
        ("stall_s", "nan", None),
        ("max_queue", "1,5", None),
        ("enforce_eager", "0", False),
        ("cache_dir", "~/molmo", Path("/home/robot/molmo")),
        ("engine_args", '{"max_num_batched_tokens": 4096}', {"max_num_batched_tokens": 4096}),
        # `docker --env-file` keeps quotes.
        ("engine_args", "'{\"max_logprobs\": 5}'", {"max_logprobs": 5}),
        ("cache_dir", '"/data/cache"', Path("/data/cache")),
        ("max_queue", " '7' ", 7),
        ("model", "'none'", "demo"),
        ("model", "it's", "it's"),
    ],
)
def test_text_of_the_environment_becomes_the_settings_type_or_is_refused(
    name: str, text: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/robot")
    monkeypatch.setenv(f"MOLMO_EDGE_{name.upper()}", text)
    if value is None:
        assert refusal().startswith(f"environment: MOLMO_EDGE_{name.upper()} should be a")
    else:
        got = getattr(resolve({}).settings, name)
        assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"model = \n", "line 1, column 9"), (b"model = '\xff'\n", "position 9"), (None, "No such")],
)
def test_a_config_file_that_cannot_be_read_is_refused(content: bytes | None, expected: str) -> None:
    if content is not None:
        Path("robot.toml").write_bytes(content)
    message = refusal("robot.toml")
    assert message.startswith("config file 'robot.toml' cannot be read: ")
    assert expected in message
    assert "home directory" in refusal("~nobody-has-this-name/x.toml")


def test_a_dotenv_that_is_no_text_file() -> None:
    Path(".env").mkdir()  # often a virtual environment
    assert resolve({}).settings == EdgeSettings()
    Path(".env").rmdir()


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-8-sig"])
def test_files_in_other_encodings_are_read(encoding: str, caplog: pytest.LogCaptureFixture) -> None:
    # Another program may add a line in an encoding of its own.
    added = b"A=1\n" + b" " * (encoding == "utf-16")
    Path(".env").write_bytes("MOLMO_EDGE_MODEL=Müll\nNAME=é\n".encode(encoding) + added)
    assert resolve({}).settings.model == "Müll"
    assert ("not UTF-8" in caplog.text) is (encoding != "utf-8-sig")
    if encoding == "utf-8-sig":
        Path("robot.toml").write_bytes("max_num_seqs = 3\n".encode(encoding))
        assert resolve({}, config="robot.toml").settings.max_num_seqs == 3


@pytest.mark.parametrize("name", ["thor", "rtx5080", "cpu"])
def test_a_deployment_takes_effect_agrees_with_its_profile_and_gives_reasons(name: str) -> None:
    path = CONFIGS / f"{name}.toml"
    text = path.read_text(encoding="utf-8")
    table = tomllib.loads(text)
    assert {"model", "profile", "precision", "kv_cache_dtype"} <= table.keys()
    device = tomllib.loads((PROFILES / f"{name}.toml").read_text(encoding="utf-8"))["settings"]
    resolved = resolve({}, config=path, profile_settings=lambda name: (name, device))
    assert resolved.profile_name == name
    for key, value in table.items():
        assert getattr(resolved.settings, key) == value, key
        assert device.get(key, value) == value, key
    lines = text.splitlines()
    for above, line in zip(["", *lines], lines, strict=False):
        if "=" in line and not line.startswith(("#", "model")):
            assert "#" in line or above.startswith("#"), f"{line} gives no reason"
