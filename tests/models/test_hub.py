"""From a model's name to its directory: what is written, what is refused, what is not imported."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from molmo_edge.checkpoint_files import read_json
from molmo_edge.devices.shapes import model_shape
from molmo_edge.errors import ModelError
from molmo_edge.models.hub import locate
from molmo_edge.models.molmo import stub, synthetic
from molmo_edge.models.molmo.config import check_layout

MOLMOS = ("allenai/Molmo-7B-D-0924", "allenai/Molmo-7B-O-0924", "allenai/Molmo-72B-0924")
HEAVY = "print(sorted({'torch', 'transformers', 'vllm'} & set(sys.modules)))"


def printed(code: str) -> list[str]:
    run = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\n{HEAVY}"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return run.stdout.split()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize(
    ("model", "directory"),
    [
        (stub.NAME, f"stub-{stub._STUB_VERSION}"),
        (MOLMOS[0], f"shaped-{stub._DESCRIPTION_VERSION}/Molmo-7B-D-0924"),
    ],
)
def test_a_written_checkpoint_is_located_without_torch(
    tmp_path: Path, model: str, directory: str
) -> None:
    (tmp_path / directory).mkdir(parents=True)
    (tmp_path / directory / "config.json").write_text("{}")
    code = (
        "from pathlib import Path\n"
        "from molmo_edge.models import hub\n"
        "hub._cached = lambda name: None\n"
        f"print(hub.locate({model!r}, Path({str(tmp_path)!r}), 'dummy'))"
    )
    assert printed(code) == [str(tmp_path / directory), "[]"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("'no such model'", "ModelError"),
        ("'/no/such/directory'", "ModelError"),
        ("'stub', cache_dir='/dev/null/x'", "ModelError"),
        ("'stub', max_crops=0", "ConfigError"),
        ("'stub', profle='cpu'", "ConfigError"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_heavy_is_imported(
    arguments: str, error: str
) -> None:
    code = (
        "from molmo_edge import EdgeVLM\n"
        "from molmo_edge.errors import MolmoEdgeError\n"
        "try:\n"
        f"    EdgeVLM({arguments})\n"
        "except MolmoEdgeError as exc:\n"
        "    print(type(exc).__name__)"
    )
    assert printed(code) == [error, "[]"]


def test_a_missing_stub_is_written_once_and_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []

    def write(directory: Path, **_: object) -> None:
        written.append(directory)
        directory.mkdir()
        (directory / "config.json").write_text("{}")

    monkeypatch.setattr(synthetic, "write_checkpoint", write)
    directory = locate(stub.NAME, tmp_path)
    assert directory == locate(stub.NAME, tmp_path) and (directory / "config.json").is_file()
    assert len(written) == 1 and not written[0].exists()
    assert [path.name for path in tmp_path.iterdir()] == [directory.name]


@pytest.mark.parametrize("model", [stub.NAME, MOLMOS[0]])
def test_a_cache_that_cannot_be_written_is_a_model_error(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("molmo_edge.models.hub._cached", lambda name: None)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ModelError, match="cache_dir"):
        locate(model, blocked, "dummy")


@pytest.mark.parametrize("name", MOLMOS)
def test_a_description_has_the_models_sizes_and_a_supported_layout(name: str, root: Path) -> None:
    directory = stub.ensure_description(name, root)
    check_layout(read_json(directory / "config.json"))
    assert replace(model_shape(directory), name=name) == model_shape(name)
    assert not list(directory.glob("*.safetensors"))


def test_image_tokens_come_after_the_real_number_of_tokens(root: Path) -> None:
    from tokenizers import Tokenizer

    directory = stub.ensure_description(MOLMOS[0], root)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    rows = read_json(directory / "config.json")["embedding_size"]
    assert tokenizer.token_to_id("<im_start>") == rows
    ids = tokenizer.encode(" User: hi<im_patch>").ids
    assert ids[-1] == tokenizer.token_to_id("<im_patch>") and max(ids[:-1]) < rows


def test_gemma_and_unknown_names_have_no_description() -> None:
    assert all(stub.is_known(name) for name in MOLMOS)
    assert not stub.is_known("google/gemma-3-4b-it") and not stub.is_known("somebody/else")


def test_dummy_weights_of_a_known_model_need_no_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    directory = locate(MOLMOS[1], tmp_path, "dummy")
    assert directory.is_relative_to(tmp_path)
    assert locate(MOLMOS[1], tmp_path, "dummy") == directory
