"""Settings: the order of sources, where each value came from, and what is refused."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from rich.console import Console

import molmo_edge
from molmo_edge.errors import ConfigError
from molmo_edge.settings import EdgeSettings, Resolved, resolve, settings_table
from molmo_edge.settings_checks import KVCacheDtype

CONFIGS = Path(__file__).parents[1] / "configs"
PROFILES = Path(molmo_edge.__file__).parent / "devices" / "profiles"

INTEGERS = [
    "max_model_len",
    "max_num_seqs",
    "max_crops",
    "seed",
    "max_queue",
    "max_image_bytes",
    "max_image_pixels",
]
FLOATS = ["gpu_memory_utilization", "kv_cache_memory_gb", "mm_processor_cache_gb", "stall_s"]
WORDS = ["precision", "dtype", "kv_cache_dtype", "resize", "speculation"]
SWITCHES = ["enforce_eager", "enable_prefix_caching"]


class Sources:
    """Every source, empty; the files are written into a folder of the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environ: dict[str, str] = {}
        self.profile: tuple[str, Mapping[str, Any]] | None = None
        self.asked: list[str] = []
        self.config: Path | None = None

    def toml(self, text: str | bytes, name: str = "robot.toml") -> Path:
        path = self.folder / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    def dotenv(self, text: str) -> None:
        (self.folder / ".env").write_text(text, encoding="utf-8")

    def resolve(self, /, **arguments: Any) -> Resolved:
        def look_up(name: str) -> tuple[str, Mapping[str, Any]]:
            self.asked.append(name)
            assert self.profile is not None
            return self.profile

        return resolve(
            arguments,
            config=self.config,
            profile_settings=look_up if self.profile else None,
            environ=self.environ,
            dotenv=self.folder / ".env",
        )

    def refusal(self, /, **arguments: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            self.resolve(**arguments)
        return str(caught.value)


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    return Sources(tmp_path)


# The order of sources


def give_argument(sources: Sources, arguments: dict[str, Any]) -> None:
    arguments["max_num_seqs"] = 6


def give_environment(sources: Sources, arguments: dict[str, Any]) -> None:
    sources.environ["MOLMO_EDGE_MAX_NUM_SEQS"] = "5"


def give_dotenv(sources: Sources, arguments: dict[str, Any]) -> None:
    sources.dotenv("MOLMO_EDGE_MAX_NUM_SEQS=4\n")


def give_config(sources: Sources, arguments: dict[str, Any]) -> None:
    sources.config = sources.toml("max_num_seqs = 3\n")


def give_profile(sources: Sources, arguments: dict[str, Any]) -> None:
    sources.profile = ("thor", {"max_num_seqs": 2})


LADDER: list[tuple[Callable[[Sources, dict[str, Any]], None], int, str]] = [
    (give_argument, 6, "argument"),
    (give_environment, 5, "environment MOLMO_EDGE_MAX_NUM_SEQS"),
    (give_dotenv, 4, ".env"),
    (give_config, 3, "config robot.toml"),
    (give_profile, 2, "profile thor"),
]


@pytest.mark.parametrize("top", range(len(LADDER)))
def test_each_source_beats_all_below_it(sources: Sources, top: int) -> None:
    arguments: dict[str, Any] = {}
    for put, _, _ in LADDER[top:]:
        put(sources, arguments)
    resolved = sources.resolve(**arguments)
    assert resolved.settings.max_num_seqs == LADDER[top][1]
    assert resolved.origin["max_num_seqs"] == LADDER[top][2]


def test_without_any_source_every_value_is_a_default(sources: Sources) -> None:
    resolved = sources.resolve()
    assert set(resolved.origin) == set(EdgeSettings.model_fields)
    assert set(resolved.origin.values()) == {"default"}
    assert resolved.settings == EdgeSettings()
    assert (resolved.settings.model, resolved.settings.kv_cache_dtype) == ("stub", "fp8")
    assert resolved.profile_name is None


@pytest.mark.parametrize("text", ["", "  ", "none", "None"])
def test_not_given_lets_the_source_below_through(sources: Sources, text: str) -> None:
    sources.environ["MOLMO_EDGE_MAX_NUM_SEQS"] = text
    give_dotenv(sources, {})
    resolved = sources.resolve(max_num_seqs=None)
    assert resolved.settings.max_num_seqs == 4
    assert resolved.origin["max_num_seqs"] == ".env"


def test_engine_args_merge_a_key_at_a_time_and_each_key_has_its_origin(sources: Sources) -> None:
    sources.environ["MOLMO_EDGE_ENGINE_ARGS"] = '{"a": 2, "b": [2], "c": null}'
    sources.dotenv('MOLMO_EDGE_ENGINE_ARGS=\'{"b": 3, "d": true}\'\n')
    sources.config = sources.toml("[engine_args]\nd = 4\n[engine_args.e]\nx = 4\n")
    sources.profile = ("thor", {"engine_args": {"e": {"y": 5}, "f": 5}})
    resolved = sources.resolve(engine_args={"a": 1})
    assert resolved.settings.engine_args == {
        "a": 1, "b": [2], "c": None, "d": True, "e": {"x": 4}, "f": 5,
    }  # fmt: skip
    variable = "environment MOLMO_EDGE_ENGINE_ARGS"
    assert {k: v for k, v in resolved.origin.items() if k.startswith("engine_args")} == {
        "engine_args.a": "argument",
        "engine_args.b": variable,
        "engine_args.c": variable,
        "engine_args.d": ".env",
        "engine_args.e": "config robot.toml",
        "engine_args.f": "profile thor",
    }


def test_a_config_file_may_be_named_by_argument_environment_or_dotenv(sources: Sources) -> None:
    for number in (1, 2, 3):
        sources.toml(f"max_num_seqs = {number}\n", f"{number}.toml")
    sources.dotenv(f"MOLMO_EDGE_CONFIG={sources.folder / '3.toml'}\n")
    assert sources.resolve().origin["max_num_seqs"] == "config 3.toml"
    sources.environ["MOLMO_EDGE_CONFIG"] = str(sources.folder / "2.toml")
    assert sources.resolve().origin["max_num_seqs"] == "config 2.toml"
    sources.config = sources.folder / "1.toml"
    assert sources.resolve().settings.max_num_seqs == 1


def test_the_profile_is_looked_up_once_by_the_name_the_highest_source_gave(
    sources: Sources,
) -> None:
    sources.profile = ("thor", {"max_num_seqs": 2})
    resolved = sources.resolve()
    assert (resolved.settings.profile, resolved.profile_name) == ("auto", "thor")
    sources.environ["MOLMO_EDGE_PROFILE"] = "spark"
    sources.config = sources.toml('profile = "orin"\n')
    sources.resolve()
    sources.resolve(profile="cpu")
    assert sources.asked == ["auto", "spark", "cpu"]


def test_an_unknown_profile_says_which_source_named_it(sources: Sources) -> None:
    def look_up(name: str) -> tuple[str, Mapping[str, Any]]:
        raise ConfigError(f"unknown profile {name!r}")

    with pytest.raises(ConfigError, match=r"unknown profile 'x' .*environment MOLMO_EDGE_PROFILE"):
        resolve({}, profile_settings=look_up, environ={"MOLMO_EDGE_PROFILE": "x"}, dotenv=None)


def test_the_process_environment_and_its_dotenv_are_read_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOLMO_EDGE_MAX_CROPS", "4")
    (tmp_path / ".env").write_text("MOLMO_EDGE_MAX_QUEUE=9\n")
    settings = resolve({}).settings
    assert (settings.max_crops, settings.max_queue) == (4, 9)


# Names


def test_a_misspelt_name_in_any_source_is_refused_with_the_nearest(sources: Sources) -> None:
    assert "argument: unknown name 'max_model_length'; the nearest valid name is max_model_len" in (
        sources.refusal(max_model_length=1024)
    )
    sources.environ["MOLMO_EDGE_MAX_MODEL_LENN"] = "1024"
    assert sources.refusal().endswith("nearest valid name is MOLMO_EDGE_MAX_MODEL_LEN")
    sources.environ.clear()
    sources.dotenv("A=1\n\n# text\nMOLMO_EDGE_PERCISION=fp8\n")
    assert sources.refusal() == (
        ".env line 4: unknown name 'MOLMO_EDGE_PERCISION'; "
        "the nearest valid name is MOLMO_EDGE_PRECISION"
    )
    sources.dotenv("")
    sources.config = sources.toml("[enginee_args]\na = 1\n")
    assert sources.refusal() == (
        "config robot.toml: unknown name 'enginee_args'; the nearest valid name is engine_args"
    )
    sources.config = None
    sources.profile = ("thor", {"max-num-seqs": 3})
    assert sources.refusal() == (
        "profile thor: unknown name 'max-num-seqs'; the nearest valid name is max_num_seqs"
    )


@pytest.mark.parametrize("name", ["molmo_edge_model", "MOLMO_EDGE_model", "Molmo_Edge_MODEL"])
def test_environment_names_are_upper_case(sources: Sources, name: str) -> None:
    sources.environ[name] = "stub"
    assert sources.refusal().endswith(f"{name!r}; the nearest valid name is MOLMO_EDGE_MODEL")


def test_a_profile_cannot_name_another_profile(sources: Sources) -> None:
    sources.profile = ("thor", {"profile": "orin"})
    assert "profile thor: unknown name 'profile'" in sources.refusal()


def test_other_programs_variables_are_left_alone(sources: Sources) -> None:
    sources.environ |= {"PATH": "/bin", "VLLM_MOLMO_EDGE": "x", "MAX_NUM_SEQS": "nan"}
    sources.dotenv("not a line\nexport PATH=x\nDATABASE='unclosed\n")
    assert set(sources.resolve().origin.values()) == {"default"}


def test_settings_under_a_table_are_explained(sources: Sources) -> None:
    sources.config = sources.toml("[settings]\nseed = 1\n")
    assert "at the top level" in sources.refusal()


def test_everything_wrong_is_told_at_once(sources: Sources) -> None:
    sources.environ["MOLMO_EDGE_SEED"] = "x"
    sources.dotenv("MOLMO_EDGE_STALL_S=inf\n")
    sources.config = sources.toml("model = 3\n")
    assert sources.refusal(max_crops=99).splitlines() == [
        "argument: max_crops must be at most 32, not 99",
        "environment MOLMO_EDGE_SEED: seed must be a whole number, not 'x'",
        ".env: stall_s must be a finite number, not 'inf'",
        "config robot.toml: model must be text, not 3",
    ]


def test_a_wrong_value_is_refused_even_where_a_higher_source_hides_it(sources: Sources) -> None:
    sources.environ["MOLMO_EDGE_SEED"] = "x"
    assert "MOLMO_EDGE_SEED" in sources.refusal(seed=1)


# Values


@pytest.mark.parametrize("name", INTEGERS + FLOATS)
@pytest.mark.parametrize("value", [True, False, math.inf, -math.inf, math.nan, "512", [512]])
def test_no_number_may_be_boolean_infinite_nan_or_text(
    sources: Sources, name: str, value: object
) -> None:
    assert sources.refusal(**{name: value}).startswith(f"argument: {name} must be a ")
    if not isinstance(value, str):
        sources.config = sources.toml(
            f"{name} = {json.dumps(value).lower().replace('infinity', 'inf')}\n"
        )
        assert sources.refusal().startswith(f"config robot.toml: {name} must be a ")


@pytest.mark.parametrize("name", INTEGERS + FLOATS)
@pytest.mark.parametrize("text", ["true", "False", "inf", "-Infinity", "nan", "1e999", "x", "1,5"])
def test_no_number_in_the_environment_may_be_boolean_infinite_or_nan(
    sources: Sources, name: str, text: str
) -> None:
    variable = f"MOLMO_EDGE_{name.upper()}"
    sources.environ[variable] = text
    assert sources.refusal().startswith(f"environment {variable}: {name} must be a ")


@pytest.mark.parametrize("name", WORDS + SWITCHES)
@pytest.mark.parametrize("value", [1, 0.5, math.nan, "perhaps"])
def test_no_word_or_switch_takes_anything_else(sources: Sources, name: str, value: object) -> None:
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
    ],
)
def test_ranges(sources: Sources, name: str, refused: list[Any], taken: list[Any]) -> None:
    for value in refused:
        assert sources.refusal(**{name: value}).startswith(f"argument: {name} must be ")
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
        ("enable_prefix_caching", "1", True),
        ("precision", "fp8", "fp8"),
        ("model", "allenai/Molmo-7B-D-0924", "allenai/Molmo-7B-D-0924"),
        ("cache_dir", "/data/cache", Path("/data/cache")),
        ("engine_args", '{"max_num_batched_tokens": 4096}', {"max_num_batched_tokens": 4096}),
    ],
)
def test_text_of_the_environment_becomes_the_settings_type(
    sources: Sources, name: str, text: str, value: object
) -> None:
    sources.environ[f"MOLMO_EDGE_{name.upper()}"] = text
    got = getattr(sources.resolve().settings, name)
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("bitsandbytes", "no longer has it"),
        ("nvfp4_per_token", "leaves dense layers"),
        ("NVFP4-per-token", "leaves dense layers"),
        ("int8_per_channel_weight_only", "leaves dense layers"),
        ("int8", "use fp8"),
        ("w8a8", "use fp8"),
    ],
)
def test_a_precision_that_would_not_work_is_refused_with_its_reason(
    sources: Sources, word: str, reason: str
) -> None:
    assert reason in sources.refusal(precision=word)
    sources.environ["MOLMO_EDGE_PRECISION"] = word
    message = sources.refusal()
    assert message.startswith(f"environment MOLMO_EDGE_PRECISION: precision {word!r} is refused")
    assert message.endswith("auto, bf16, fp8, w4a16, nvfp4")


@pytest.mark.parametrize(
    ("name", "word", "hint"),
    [
        ("precision", "FP8", "fp8"),
        ("precision", "bfloat16", "bf16"),
        ("precision", "fp8_per_channel", "fp8"),
        ("precision", "w4a8", "w4a16"),
        ("kv_cache_dtype", "fp8-e4m3", "fp8_e4m3"),
        ("dtype", "float", "float32"),
        ("resize", "tensor-flow", "tensorflow"),
    ],
)
def test_any_other_word_is_refused_with_the_nearest(
    sources: Sources, name: str, word: str, hint: str
) -> None:
    assert sources.refusal(**{name: word}).endswith(f"the nearest valid word is {hint}")


@pytest.mark.parametrize(
    "value",
    [
        {"a": math.inf},
        {"a": {"b": [1, math.nan]}},
        {"a": (math.nan,)},
        {"a": Decimal("1"), 3: 4},
        {" ": 1},
        "a=1",
        [("a", 1)],
    ],
)
def test_engine_args_hold_names_and_finite_numbers(sources: Sources, value: object) -> None:
    assert sources.refusal(engine_args=value).startswith("argument: engine_args ")


@pytest.mark.parametrize(
    "text", ["{", "[1]", "3", '{"a": NaN}', '{"a": 1e999}', '{"a": ' + "[" * 20_000, "9" * 5_000]
)
def test_engine_args_in_the_environment_are_a_json_object(sources: Sources, text: str) -> None:
    sources.environ["MOLMO_EDGE_ENGINE_ARGS"] = text
    message = sources.refusal()
    assert message.startswith("environment MOLMO_EDGE_ENGINE_ARGS: engine_args must ")
    assert len(message) < 300


def test_engine_args_nested_without_end_are_refused(sources: Sources) -> None:
    loop: dict[str, Any] = {}
    loop["again"] = loop
    assert sources.refusal(engine_args=loop) == "argument: engine_args is nested too deeply"


@pytest.mark.parametrize("value", ["", ".", "a\0b", "~nobody-has-this-name/x", 3, True])
def test_the_cache_folder_is_a_path(sources: Sources, value: object) -> None:
    assert sources.refusal(cache_dir=value).startswith("argument: cache_dir ")


def test_the_cache_folder_may_begin_with_the_home_folder(
    sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/robot")
    sources.environ["MOLMO_EDGE_CACHE_DIR"] = "~/molmo"
    assert sources.resolve().settings.cache_dir == Path("/home/robot/molmo")


@pytest.mark.parametrize("name", ["model", "profile", "load_format", "attention_backend"])
@pytest.mark.parametrize("value", ["", " ", "a\nb", "\udc80", 3])
def test_names_are_a_line_of_text(sources: Sources, name: str, value: object) -> None:
    assert sources.refusal(**{name: value}).startswith(f"argument: {name} must be ")


# Files


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model = \n", "line 1, column 9"),
        ("seed = 1\nmax crops = 3\n", "line 2, column 5"),
        ("seed = 1\nseed = 2\n", "line 2"),
        (b"model = '\xff'\n", "not UTF-8 text: bad byte at 9"),
        ("seed = " + "9" * 5_000, "not valid TOML"),
        ("a = " + "[" * 20_000, "nested too deeply"),
        ("#" * (1 << 20) + "\n", "more than a megabyte"),
    ],
    ids=["no-value", "bad-key", "twice", "bytes", "digits", "depth", "size"],
)
def test_a_malformed_config_file_says_where(sources: Sources, text: str | bytes, told: str) -> None:
    sources.config = sources.toml(text)
    message = sources.refusal()
    assert told in message
    assert "robot.toml" in message


def test_a_config_file_that_cannot_be_read_is_a_config_error(sources: Sources) -> None:
    sources.toml("")
    sources.config = sources.folder / "rabot.toml"
    assert sources.refusal().endswith("does not exist; the nearest file there is robot.toml")
    sources.config = sources.folder
    assert "not a regular file" in sources.refusal()
    sources.config = sources.folder / ("x" * 300)
    assert sources.refusal().endswith("cannot be read: File name too long")
    sources.config = sources.folder / "quite-different.toml"
    assert sources.refusal().endswith("does not exist")
    sources.config = Path("~nobody-has-this-name/x.toml")
    assert "unknown home folder" in sources.refusal()
    for wrong in ("", "a\0b", Path("a\0b"), 3, True):
        with pytest.raises(ConfigError, match="config must be the path of a TOML file"):
            resolve({}, config=wrong, environ={}, dotenv=None)  # type: ignore[arg-type]


def test_files_that_begin_with_a_byte_order_mark_are_read(sources: Sources) -> None:
    sources.config = sources.toml("\ufeffseed = 3\n")
    sources.dotenv("\ufeffMOLMO_EDGE_MAX_CROPS=3\n")
    settings = sources.resolve().settings
    assert (settings.seed, settings.max_crops) == (3, 3)


def test_dotenv_follows_its_usual_rules(sources: Sources) -> None:
    sources.environ["HOST"] = "thor"
    sources.dotenv(
        "ROOT=/data\nMOLMO_EDGE_SEED=1\n"
        'export MOLMO_EDGE_CACHE_DIR="${ROOT}/${HOST}"  # comment\n'
        "MOLMO_EDGE_SEED=2\nMOLMO_EDGE_MAX_CROPS=3\nMOLMO_EDGE_MAX_CROPS=\nMOLMO_EDGE_MODEL\n"
    )
    resolved = sources.resolve()
    assert resolved.settings.cache_dir == Path("/data/thor")
    assert resolved.settings.seed == 2
    assert resolved.origin["max_crops"] == "default"


@pytest.mark.parametrize("line", ["MOLMO_EDGE_SEED 1", "MOLMO_EDGE_MODEL='a", 'molmo_edge_x="a'])
def test_a_malformed_dotenv_line_of_ours_is_refused(sources: Sources, line: str) -> None:
    sources.dotenv(f"OTHER=1\n{line}\n")
    assert ".env line 2: not of the form NAME=value" in sources.refusal()


def test_a_folder_named_dotenv_is_no_settings_file(sources: Sources) -> None:
    (sources.folder / ".env").mkdir()
    assert sources.resolve().settings == EdgeSettings()


def test_an_unreadable_dotenv_is_a_config_error(sources: Sources) -> None:
    (sources.folder / ".env").write_bytes(b"A=\xff\n")
    assert "not UTF-8 text" in sources.refusal()


# The values themselves


def test_settings_are_frozen_and_share_nothing_with_the_caller() -> None:
    given = {"compilation_config": {"cudagraph_capture_sizes": [1, 2]}}
    built = EdgeSettings(engine_args=given)
    given["compilation_config"]["cudagraph_capture_sizes"].append(4)
    assert built.engine_args == {"compilation_config": {"cudagraph_capture_sizes": [1, 2]}}
    with pytest.raises(ValidationError):
        built.seed = 3
    resolved = resolve({}, environ={}, dotenv=None)
    with pytest.raises(TypeError):
        resolved.origin["seed"] = "me"  # type: ignore[index]


def test_building_settings_directly_reads_no_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("SEED=9\nMOLMO_EDGE_SEED=9\n")
    monkeypatch.setenv("SEED", "9")
    monkeypatch.setenv("MOLMO_EDGE_SEED", "9")
    assert EdgeSettings().seed == 0


@pytest.mark.parametrize("values", [{"seeed": 1}, {"seed": True}, {"_env_file": ".env"}])
def test_building_settings_directly_raises_config_error(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        EdgeSettings(**values)
    assert "ydantic" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_rows_name_every_setting_and_its_origin_as_json_and_as_table(sources: Sources) -> None:
    sources.profile = ("thor", {"engine_args": {"sizes": [1, 2], "hook": object()}})
    resolved = sources.resolve(cache_dir="/data", enforce_eager=True)
    told = json.loads(json.dumps(resolved.as_dict(), allow_nan=False))
    assert told["profile"] == "thor"
    rows = told["settings"]
    assert set(rows) == set(EdgeSettings.model_fields) - {"engine_args"} | {
        "engine_args.sizes", "engine_args.hook",
    }  # fmt: skip
    assert rows["cache_dir"] == {"value": "/data", "origin": "argument"}
    assert rows["max_model_len"] == {"value": None, "origin": "default"}
    assert rows["engine_args.hook"] == {"value": "<object>", "origin": "profile thor"}
    console = Console(width=100, no_color=True)
    with console.capture() as captured:
        console.print(settings_table(resolved))
    lines = [[cell.strip() for cell in line.split("│")] for line in captured.get().splitlines()]
    assert ["", "engine_args.sizes", "[1, 2]", "profile thor", ""] in lines
    assert ["", "enforce_eager", "true", "argument", ""] in lines
    assert ["", "max_model_len", "not set", "default", ""] in lines


def test_importing_settings_loads_neither_torch_nor_vllm() -> None:
    code = "import sys, molmo_edge.settings; print(*{'torch', 'vllm', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_every_kv_cache_dtype_is_one_of_vllm() -> None:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    tree = ast.parse((Path(spec.origin).parent / "config" / "cache.py").read_text())
    literal = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "CacheDType"
    )
    known = {node.value for node in ast.walk(literal) if isinstance(node, ast.Constant)}
    assert set(get_args(KVCacheDtype)) <= known


# Any input at all

NAMES = st.sampled_from(sorted(EdgeSettings.model_fields)) | st.text(max_size=12)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(SCALARS, v))


def settles(**sources: Any) -> None:
    """Either settings, all of them with an origin, or a ConfigError in this module's own words."""
    arguments = sources.pop("arguments", {})
    try:
        resolved = resolve(arguments, **{"environ": {}, "dotenv": None, **sources})
    except ConfigError as error:
        assert "of another kind" not in str(error)
        assert "pydantic" not in str(error)
    else:
        assert len(list(resolved.rows())) >= len(EdgeSettings.model_fields)
        json.dumps(resolved.as_dict(), allow_nan=False)


@given(st.dictionaries(NAMES, VALUES, max_size=4))
@settings(deadline=None, max_examples=150)
def test_any_arguments_settle(arguments: dict[str, Any]) -> None:
    settles(arguments=arguments)


@given(st.dictionaries(NAMES.map(lambda n: f"MOLMO_EDGE_{n.upper()}"), st.text(), max_size=4))
@settings(deadline=None, max_examples=150)
def test_any_environment_settles(environ: dict[str, str]) -> None:
    settles(environ=environ)


@given(st.binary(max_size=60) | st.text(alphabet="MOLMO_EDGESEED='\"=\n#$ {}1\\", max_size=80))
@settings(deadline=None, max_examples=150)
def test_any_file_settles(tmp_path_factory: pytest.TempPathFactory, content: bytes | str) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    settles(dotenv=path)
    settles(config=path)


# The deployments that come with the package

DEPLOYMENTS = sorted(CONFIGS.glob("*.toml"))


def test_the_deployments_are_there() -> None:
    assert {path.stem for path in DEPLOYMENTS} >= {"thor", "rtx5080", "cpu"}


@pytest.mark.parametrize("path", DEPLOYMENTS, ids=lambda path: path.stem)
def test_every_key_of_a_deployment_is_a_setting_and_arrives(path: Path) -> None:
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    resolved = resolve({}, config=path, environ={}, dotenv=None)
    for name, value in table.items():
        got = getattr(resolved.settings, name)
        assert (str(got) if isinstance(got, Path) else got) == value, name
        keys = [f"engine_args.{key}" for key in value] if name == "engine_args" else [name]
        assert {resolved.origin[key] for key in keys} == {f"config {path.name}"}
    assert {"model", "profile", "precision", "kv_cache_dtype", "max_model_len"} <= table.keys()


@pytest.mark.parametrize("path", DEPLOYMENTS, ids=lambda path: path.stem)
def test_a_deployment_says_nothing_against_its_profile(path: Path) -> None:
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    profile = tomllib.loads((PROFILES / f"{table['profile']}.toml").read_text(encoding="utf-8"))
    of_the_device = profile["settings"]
    resolved = resolve(
        {},
        config=path,
        environ={},
        dotenv=None,
        profile_settings=lambda name: (name, of_the_device),
    )
    assert resolved.profile_name == path.stem
    for name in table.keys() & of_the_device.keys() - {"engine_args"}:
        assert table[name] == of_the_device[name], name


@pytest.mark.parametrize("path", DEPLOYMENTS, ids=lambda path: path.stem)
def test_every_value_of_a_deployment_has_a_reason(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if "=" in line and not line.startswith("#"):
            assert "#" in line or lines[number - 1].startswith("#") or line.startswith("model"), (
                line
            )
