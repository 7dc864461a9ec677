"""Settings: the order of sources, the source of each value, and what is refused."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import molmo_edge
from molmo_edge.errors import ConfigError
from molmo_edge.settings import EdgeSettings, Origin, Resolved, resolve

CONFIGS = Path(__file__).parents[1] / "configs"
PROFILES = Path(molmo_edge.__file__).parent / "devices" / "profiles"
INTEGERS = [
    "max_model_len", "max_num_seqs", "max_crops", "seed", "max_queue", "max_image_bytes",
    "max_image_pixels",
]  # fmt: skip
FLOATS = ["gpu_memory_utilization", "kv_cache_memory_gb", "mm_processor_cache_gb", "stall_s"]
CHOICES = ["precision", "dtype", "kv_cache_dtype", "resize", "speculation", "engine"]
SWITCHES = ["enforce_eager", "enable_prefix_caching"]


class Sources:
    """Every source, empty; the working directory is the test's own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.env = monkeypatch.setenv
        self.profile: tuple[str, Mapping[str, Any]] | None = None
        self.requested: list[str] = []
        self.config: Path | None = None

    def toml(self, text: str | bytes, name: str = "robot.toml") -> Path:
        self.config = Path(name)
        self.config.write_bytes(text.encode() if isinstance(text, str) else text)
        return self.config

    def dotenv(self, text: str) -> None:
        Path(".env").write_text(text, encoding="utf-8")

    def _profile(self, name: str) -> tuple[str, Mapping[str, Any]]:
        self.requested.append(name)
        assert self.profile is not None
        return self.profile

    def resolve(self, /, **arguments: Any) -> Resolved:
        look_up = self._profile if self.profile else None
        return resolve(arguments, config=self.config, profile_settings=look_up)

    def refusal(self, /, **arguments: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            self.resolve(**arguments)
        return str(caught.value)


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> Sources:
    return Sources(monkeypatch)


# The order of sources


def test_each_source_beats_all_below_it(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(value: int, origin: Origin, label: str, **arguments: int) -> None:
        resolved = sources.resolve(**arguments)
        assert resolved.settings.max_num_seqs == value
        assert resolved.origin["max_num_seqs"] is origin
        assert resolved.labels["max_num_seqs"] == label
        assert resolved.chosen("max_num_seqs") is (value >= 3 and value != 8)

    check(8, Origin.DEFAULT, "default")
    sources.profile = ("thor", {"max_num_seqs": 2})
    check(2, Origin.PROFILE, "profile thor")
    sources.toml("max_num_seqs = 3\n")
    check(3, Origin.CONFIG, "config robot.toml")
    sources.dotenv("MOLMO_EDGE_MAX_NUM_SEQS=4\n")
    check(4, Origin.DOTENV, ".env")
    sources.env("MOLMO_EDGE_MAX_NUM_SEQS", "5")
    check(5, Origin.ENVIRONMENT, "environment MOLMO_EDGE_MAX_NUM_SEQS")
    check(6, Origin.ARGUMENT, "argument", max_num_seqs=6)
    for text in ("", "  ", "none", "None"):  # not given
        sources.env("MOLMO_EDGE_MAX_NUM_SEQS", text)
        assert sources.resolve(max_num_seqs=None).settings.max_num_seqs == 4


def test_without_any_source_every_value_is_a_default(sources: Sources) -> None:
    resolved = sources.resolve()
    assert set(resolved.origin) == set(EdgeSettings.model_fields)
    assert set(resolved.labels.values()) == {"default"}
    assert resolved.settings == EdgeSettings()
    assert (resolved.settings.model, resolved.settings.kv_cache_dtype) == ("stub", "fp8")
    assert resolved.profile_name is None


def test_engine_args_merge_key_by_key_and_each_key_has_its_source(sources: Sources) -> None:
    sources.env("MOLMO_EDGE_ENGINE_ARGS", '{"a": 2, "b": [2], "c": null}')
    sources.dotenv('MOLMO_EDGE_ENGINE_ARGS=\'{"b": 3, "d": true}\'\n')
    sources.toml("[engine_args]\nd = 4\n[engine_args.e]\nx = 4\n")
    sources.profile = ("thor", {"engine_args": {"e": {"y": 5}, "f": 5}})
    resolved = sources.resolve(engine_args={"a": 1})
    assert resolved.settings.engine_args == {
        "a": 1, "b": [2], "c": None, "d": True, "e": {"x": 4}, "f": 5,
    }  # fmt: skip
    variable = "environment MOLMO_EDGE_ENGINE_ARGS"
    assert {k: v for k, v in resolved.labels.items() if k.startswith("engine_args")} == {
        "engine_args.a": "argument",
        "engine_args.b": variable,
        "engine_args.c": variable,
        "engine_args.d": ".env",
        "engine_args.e": "config robot.toml",
        "engine_args.f": "profile thor",
    }


@pytest.mark.parametrize(
    ("key", "setting"),
    [
        ("kv_cache_dtype", "kv_cache_dtype"),
        ("model", "model"),
        ("seed", "seed"),
        ("quantization", "precision"),
        ("kv_cache_memory_bytes", "kv_cache_memory_gb"),
    ],
)
def test_engine_args_cannot_contradict_a_setting(sources: Sources, key: str, setting: str) -> None:
    assert f"set {setting} itself" in sources.refusal(engine_args={key: "fp8"})
    sources.toml(f'[engine_args]\n{key} = "auto"\n')
    assert f"config robot.toml: engine_args must not contain {key}" in sources.refusal()


def test_a_config_file_may_be_named_by_argument_environment_or_dotenv(sources: Sources) -> None:
    for number in (1, 2, 3):
        sources.toml(f"max_num_seqs = {number}\n", f"{number}.toml")
    sources.config = None
    sources.dotenv("MOLMO_EDGE_CONFIG=3.toml\n")
    assert sources.resolve().labels["max_num_seqs"] == "config 3.toml"
    sources.env("MOLMO_EDGE_CONFIG", "2.toml")
    assert sources.resolve().labels["max_num_seqs"] == "config 2.toml"
    sources.config = Path("1.toml")
    assert sources.resolve().settings.max_num_seqs == 1


def test_the_profile_is_looked_up_once_by_the_name_the_highest_source_gave(
    sources: Sources,
) -> None:
    sources.profile = ("thor", {"max_num_seqs": 2})
    resolved = sources.resolve()
    assert (resolved.settings.profile, resolved.profile_name) == ("auto", "thor")
    sources.env("MOLMO_EDGE_PROFILE", "spark")
    sources.toml('profile = "orin"\n')
    sources.resolve()
    sources.resolve(profile="cpu")
    assert sources.requested == ["auto", "spark", "cpu"]


def test_a_wrong_profile_is_refused_with_the_source_that_named_it(sources: Sources) -> None:
    def look_up(name: str) -> tuple[str, Mapping[str, Any]]:
        raise ConfigError(f"unknown profile {name!r}")

    sources.env("MOLMO_EDGE_PROFILE", "x")
    with pytest.raises(ConfigError, match=r"unknown profile 'x' .*environment MOLMO_EDGE_PROFILE"):
        resolve({}, profile_settings=look_up)
    sources.profile = ("thor", {"profile": "orin"})
    assert "profile thor: unknown name 'profile'" in sources.refusal()


# Names


def test_a_misspelt_name_in_any_source_is_refused_with_the_nearest(
    sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sources.refusal(max_model_length=1024) == (
        "argument: unknown name 'max_model_length'; the nearest valid name is max_model_len"
    )
    for name in ("MOLMO_EDGE_MODELL", "molmo_edge_model", "MOLMO_EDGE_model"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "stub")
            assert sources.refusal() == (
                f"environment: unknown name {name!r}; the nearest valid name is MOLMO_EDGE_MODEL"
            )
    sources.dotenv("A=1\nMOLMO_EDGE_PERCISION=fp8\n")
    assert sources.refusal() == (
        ".env: unknown name 'MOLMO_EDGE_PERCISION'; the nearest valid name is MOLMO_EDGE_PRECISION"
    )
    sources.dotenv("")
    sources.toml("[enginee_args]\na = 1\n")
    assert sources.refusal() == (
        "config robot.toml: unknown name 'enginee_args'; the nearest valid name is engine_args"
    )
    sources.toml("[settings]\nseed = 1\n")
    assert "to the top level" in sources.refusal()
    sources.config = None
    sources.profile = ("thor", {"max-num-seqs": 3})
    assert sources.refusal() == (
        "profile thor: unknown name 'max-num-seqs'; the nearest valid name is max_num_seqs"
    )


def test_other_programs_variables_are_left_alone(sources: Sources) -> None:
    sources.env("VLLM_MOLMO_EDGE", "x")
    sources.env("MAX_NUM_SEQS", "nan")
    sources.dotenv("not a line\nexport PATH=x\nDATABASE='unclosed\n")
    assert set(sources.resolve().labels.values()) == {"default"}


def test_every_problem_is_reported_at_once_even_where_a_higher_source_hides_it(
    sources: Sources,
) -> None:
    sources.env("MOLMO_EDGE_SEED", "x")
    sources.dotenv("MOLMO_EDGE_STALL_S=inf\n")
    sources.toml("model = 3\n")
    assert sources.refusal(max_crops=99, seed=1).splitlines() == [
        "argument: max_crops must be at most 32, not 99",
        "environment MOLMO_EDGE_SEED: seed must be an integer, not 'x'",
        ".env: stall_s must be a finite number, not 'inf'",
        "config robot.toml: model must be a string, not 3",
    ]


# Values


@pytest.mark.parametrize("name", INTEGERS + FLOATS)
def test_a_number_is_not_boolean_infinite_nan_or_text(
    sources: Sources, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in (True, False, math.inf, -math.inf, math.nan, "512", [512]):
        assert sources.refusal(**{name: value}).startswith(f"argument: {name} must be a")
        if not isinstance(value, str):
            sources.toml(f"{name} = {json.dumps(value).lower().replace('infinity', 'inf')}\n")
            assert sources.refusal().startswith(f"config robot.toml: {name} must be a")
            sources.config = None
    for text in ("true", "False", "inf", "-Infinity", "nan", "1e999", "x", "1,5"):
        variable = f"MOLMO_EDGE_{name.upper()}"
        monkeypatch.setenv(variable, text)
        assert sources.refusal().startswith(f"environment {variable}: {name} must be a")


@pytest.mark.parametrize("name", CHOICES + SWITCHES)
@pytest.mark.parametrize("value", [1, 0.5, math.nan, "perhaps"])
def test_a_choice_or_a_switch_takes_nothing_else(
    sources: Sources, name: str, value: object
) -> None:
    assert sources.refusal(**{name: value}).startswith(f"argument: {name} must be ")


@pytest.mark.parametrize(
    ("name", "refused", "taken"),
    [
        ("max_model_len", [63, -1], [64]),
        ("max_num_seqs", [0, 1025], [1, 1024]),
        ("max_crops", [0, 33], [1, 32]),
        ("seed", [-1, 2**32], [0, 2**32 - 1]),
        ("gpu_memory_utilization", [0, -0.1, 1.01, 10**400], [0.01, 1]),
        ("kv_cache_memory_gb", [0, -1], [0.1]),
        ("mm_processor_cache_gb", [-0.1], [0, 4]),
        ("max_queue", [0], [1]),
        ("stall_s", [0.0, -1], [0.1]),
        ("max_image_bytes", [0], [1]),
        ("max_image_pixels", [0], [1]),
        ("cache_dir", ["", ".", "a\0b", "~nobody-has-this-name/x", 3, True], [Path("/data")]),
        ("model", ["", " ", "a\nb", "\udc80", 3], ["path/to/checkpoint"]),
        ("attention_backend", ["", "a\nb", 3], ["TRITON_ATTN"]),
    ],
)
def test_ranges(sources: Sources, name: str, refused: list[Any], taken: list[Any]) -> None:
    for value in refused:
        assert sources.refusal(**{name: value}).startswith(f"argument: {name} ")
    for value in taken:
        assert getattr(sources.resolve(**{name: value}).settings, name) == value


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("max_num_seqs", " 16 ", 16),
        ("max_image_pixels", "1_000_000", 1_000_000),
        ("gpu_memory_utilization", "0.5", 0.5),
        ("stall_s", "30", 30.0),
        ("enforce_eager", "true", True),
        ("enforce_eager", "0", False),
        ("precision", "fp8", "fp8"),
        ("cache_dir", "~/molmo", Path("/home/robot/molmo")),
        ("engine_args", '{"max_num_batched_tokens": 4096}', {"max_num_batched_tokens": 4096}),
    ],
)
def test_text_of_the_environment_becomes_the_settings_type(
    sources: Sources, name: str, text: str, value: object
) -> None:
    sources.env("HOME", "/home/robot")
    sources.env(f"MOLMO_EDGE_{name.upper()}", text)
    got = getattr(sources.resolve().settings, name)
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bitsandbytes", "no longer loads"),
        ("NVFP4-per-token", "leave every dense layer"),
        ("int8_per_channel_weight_only", "leave every dense layer"),
        ("w8a8", "use fp8"),
    ],
)
def test_a_precision_that_would_not_work_is_refused_with_its_reason(
    sources: Sources, name: str, reason: str
) -> None:
    assert reason in sources.refusal(precision=name)
    sources.env("MOLMO_EDGE_PRECISION", name)
    message = sources.refusal()
    assert message.startswith(f"environment MOLMO_EDGE_PRECISION: precision {name!r} is refused")
    assert message.endswith("auto, bf16, fp8, w4a16, nvfp4")


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("precision", "FP8", "fp8"),
        ("precision", "bfloat16", "bf16"),
        ("precision", "w4a8", "w4a16"),
        ("kv_cache_dtype", "fp8-e4m3", "fp8_e4m3"),
        ("dtype", "float", "float32"),
        ("resize", "tensor-flow", "tensorflow"),
    ],
)
def test_any_other_choice_is_refused_with_the_nearest(
    sources: Sources, name: str, value: str, hint: str
) -> None:
    assert sources.refusal(**{name: value}).endswith(f"the nearest valid value is {hint}")


def test_engine_args_hold_names_and_finite_numbers(sources: Sources) -> None:
    loop: dict[str, Any] = {}
    loop["again"] = loop
    for value in (
        {"a": math.inf}, {"a": {"b": [1, math.nan]}}, {"a": (math.nan,)}, {3: 4}, {" ": 1}, "a=1",
        [("a", 1)], loop,
    ):  # fmt: skip
        assert sources.refusal(engine_args=value).startswith("argument: engine_args ")
    for text in ("{", "[1]", '{"a": NaN}', '{"a": 1e999}', '{"a": ' + "[" * 20_000, "9" * 5_000):
        sources.env("MOLMO_EDGE_ENGINE_ARGS", text)
        message = sources.refusal()
        assert message.startswith("environment MOLMO_EDGE_ENGINE_ARGS: engine_args ")
        assert len(message) < 300


# Files


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model = \n", "line 1, column 9"),
        ("seed = 1\nseed = 2\n", "line 2"),
        (b"model = '\xff'\n", "position 9"),
        ("seed = " + "9" * 5_000, "not valid TOML"),
        ("a = " + "[" * 20_000, "not valid TOML"),
        ("#" * (1 << 20) + "\n", "at most a megabyte"),
    ],
    ids=["no-value", "twice", "bytes", "digits", "depth", "size"],
)
def test_a_malformed_config_file_is_refused_with_its_place(
    sources: Sources, text: str | bytes, expected: str
) -> None:
    sources.toml(text)
    message = sources.refusal()
    assert expected in message
    assert "robot.toml" in message


def test_a_config_file_that_cannot_be_read_is_a_config_error(sources: Sources) -> None:
    sources.toml("")
    for config, expected in (
        ("rabot.toml", "does not exist; the nearest file there is robot.toml"),
        ("quite-different.toml", "does not exist"),
        (".", "not a file"),
        ("x" * 300, "File name too long"),
        ("~nobody-has-this-name/x.toml", "unknown home directory"),
        ("", "config must be the path of a TOML file"),
        ("a\0b", "config must be the path of a TOML file"),
    ):
        with pytest.raises(ConfigError, match=expected):
            resolve({}, config=config)


def test_dotenv_follows_its_usual_rules(sources: Sources) -> None:
    sources.env("HOST", "thor")
    sources.dotenv(
        "\ufeffROOT=/data\nMOLMO_EDGE_SEED=1\n"
        'export MOLMO_EDGE_CACHE_DIR="${ROOT}/${HOST}"  # comment\n'
        "MOLMO_EDGE_SEED=2\nMOLMO_EDGE_MAX_CROPS=3\nMOLMO_EDGE_MAX_CROPS=\nMOLMO_EDGE_MODEL\n"
    )
    resolved = sources.resolve()
    assert resolved.settings.cache_dir == Path("/data/thor")
    assert resolved.settings.seed == 2
    assert resolved.labels["max_crops"] == "default"


@pytest.mark.parametrize("line", ["MOLMO_EDGE_SEED 1", "MOLMO_EDGE_MODEL='a", 'molmo_edge_x="a'])
def test_a_malformed_dotenv_line_of_ours_is_refused(sources: Sources, line: str) -> None:
    sources.dotenv(f"OTHER=1\n{line}\n")
    assert ".env line 2: not of the form NAME=value" in sources.refusal()


def test_a_dotenv_that_is_no_text_file(sources: Sources) -> None:
    Path(".env").mkdir()  # often a virtual environment
    assert sources.resolve().settings == EdgeSettings()
    Path(".env").rmdir()
    Path(".env").write_bytes(b"A=\xff\n")
    assert "not UTF-8 text" in sources.refusal()


# The values themselves


def test_settings_are_frozen_and_share_nothing_with_the_caller() -> None:
    given = {"compilation_config": {"cudagraph_capture_sizes": [1, 2]}}
    built = EdgeSettings(engine_args=given)
    given["compilation_config"]["cudagraph_capture_sizes"].append(4)
    assert built.engine_args == {"compilation_config": {"cudagraph_capture_sizes": [1, 2]}}
    resolved = resolve({})
    for frozen in (built, resolved.settings):
        with pytest.raises(ValidationError):
            frozen.seed = 3
    with pytest.raises(TypeError):
        resolved.origin["seed"] = Origin.ARGUMENT  # type: ignore[index]


def test_the_constructor_reads_no_source_and_raises_config_error(sources: Sources) -> None:
    sources.env("SEED", "9")
    sources.env("MOLMO_EDGE_SEED", "9")
    sources.dotenv("SEED=9\nMOLMO_EDGE_SEED=9\n")
    assert EdgeSettings().seed == 0
    for values in ({"seeed": 1}, {"seed": True}, {"_env_file": ".env"}):
        with pytest.raises(ConfigError) as caught:
            EdgeSettings(**values)
        assert "ydantic" not in str(caught.value)
        assert caught.value.__context__ is None


def test_rows_name_every_setting_its_json_value_and_its_source(sources: Sources) -> None:
    sources.profile = ("thor", {"engine_args": {"sizes": [1, 2], "hook": object()}})
    rows = {name: (value, label) for name, value, label in sources.resolve(cache_dir="/d").rows()}
    assert set(rows) == set(EdgeSettings.model_fields) - {"engine_args"} | {
        "engine_args.sizes", "engine_args.hook",
    }  # fmt: skip
    assert rows["cache_dir"] == ("/d", "argument")
    assert rows["max_model_len"] == (None, "default")
    assert rows["engine_args.hook"] == ("<object>", "profile thor")
    assert rows["engine_args.sizes"] == ([1, 2], "profile thor")


def test_importing_settings_loads_neither_torch_nor_vllm() -> None:
    code = "import sys, molmo_edge.settings; print(*{'torch', 'vllm', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# Any input at all

NAMES = st.sampled_from(sorted(EdgeSettings.model_fields)) | st.text(max_size=12)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(SCALARS, v))
LINE = st.text(st.characters(exclude_characters="\0=", exclude_categories=["Cs"]), max_size=12)
VARIABLES = (st.sampled_from(sorted(EdgeSettings.model_fields)) | LINE).map(
    lambda name: f"MOLMO_EDGE_{name.upper()}"
)
fuzz = settings(
    deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def settles(arguments: Mapping[str, Any], config: Path | None = None) -> None:
    """Either settings, all of them with a source, or a ConfigError in this module's own words."""
    try:
        resolved = resolve(arguments, config=config)
    except ConfigError as error:
        assert "of another type" not in str(error)
        assert "pydantic" not in str(error)
    else:
        rows = list(resolved.rows())
        assert len(rows) >= len(EdgeSettings.model_fields)
        json.dumps(rows, allow_nan=False)


@fuzz
@given(st.dictionaries(NAMES, VALUES, max_size=4))
def test_any_arguments_settle(arguments: dict[str, Any]) -> None:
    settles(arguments)


@fuzz
@given(st.dictionaries(VARIABLES, LINE, max_size=4))
def test_any_environment_settles(environ: dict[str, str]) -> None:
    with mock.patch.dict(os.environ, environ):
        settles({})


@fuzz
@given(st.binary(max_size=60) | st.text(alphabet="MOLMO_EDGESEED='\"=\n#$ {}1\\", max_size=80))
def test_any_file_settles(content: bytes | str) -> None:
    data = content if isinstance(content, bytes) else content.encode()
    Path(".env").write_bytes(data)
    settles({})
    Path(".env").unlink()
    Path("any.toml").write_bytes(data)
    settles({}, Path("any.toml"))


# The deployments that come with the package

DEPLOYMENTS = sorted(CONFIGS.glob("*.toml"))


def test_the_deployments_are_there() -> None:
    assert {path.stem for path in DEPLOYMENTS} >= {"thor", "rtx5080", "cpu"}


@pytest.mark.parametrize("path", DEPLOYMENTS, ids=lambda path: path.stem)
def test_a_deployment_takes_effect_agrees_with_its_profile_and_gives_reasons(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    table = tomllib.loads(text)
    assert {"model", "profile", "precision", "kv_cache_dtype", "max_model_len"} <= table.keys()
    profile = tomllib.loads((PROFILES / f"{table['profile']}.toml").read_text(encoding="utf-8"))
    device = profile["settings"]
    resolved = resolve({}, config=path, profile_settings=lambda name: (name, device))
    assert resolved.profile_name == path.stem
    for name, value in table.items():
        got = getattr(resolved.settings, name)
        assert (str(got) if isinstance(got, Path) else got) == value, name
        assert resolved.origin[name] is Origin.CONFIG
        assert device.get(name, value) == value, name
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if "=" in line and not line.startswith("#"):
            reason = "#" in line or lines[number - 1].startswith("#")
            assert reason or line.startswith("model"), line
