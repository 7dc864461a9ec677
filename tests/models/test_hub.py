"""From a model's name to its directory: what is written, what is refused, what is not imported."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from huggingface_hub import constants
from safetensors import SafetensorError
from tokenizers import Tokenizer

from molmo_edge.checkpoint_files import read_config
from molmo_edge.devices.shapes import model_shape
from molmo_edge.devices.tensors import KNOWN
from molmo_edge.errors import ModelError
from molmo_edge.models.hub import STUB, STUB2, locate, locate_cached
from molmo_edge.models.molmo import synthetic
from molmo_edge.models.molmo.prompts import IMAGE_TOKENS
from molmo_edge.models.molmo2 import synthetic as synthetic2
from molmo_edge.models.registry import family_of

MOLMOS = [name for name, config in KNOWN.items() if config["model_type"].startswith("molmo")]
HEAVY = "print(sorted({'torch', 'transformers', 'vllm'} & set(sys.modules)))"


def printed(code: str) -> list[str]:
    run = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\n{HEAVY}"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return run.stdout.split()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("'no such model'", "ModelError"),
        ("'/no/such/directory'", "ModelError"),
        ("'a/' + 'b' * 300", "ModelError"),
        ("'stub', cache_dir='c' * 300", "ModelError"),
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


@pytest.mark.parametrize(("stub", "module"), [(STUB, synthetic), (STUB2, synthetic2)])
def test_a_missing_stub_is_written_once_and_whole_and_then_located_without_torch(
    stub: str, module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []

    def write(directory: Path) -> None:
        written.append(directory)
        directory.mkdir()
        (directory / "config.json").write_text("{}")

    monkeypatch.setattr(module, "write_stub", write)
    directory = locate(stub, tmp_path)
    assert (directory / "config.json").is_file()
    assert len(written) == 1 and not written[0].exists()
    assert [path.name for path in tmp_path.iterdir()] == [directory.name]
    code = (
        "from pathlib import Path\n"
        "from molmo_edge.models import hub\n"
        f"print(hub.locate({stub!r}, Path({str(tmp_path)!r})))"
    )
    assert printed(code) == [str(directory), "[]"]


@pytest.mark.parametrize("model", [STUB, MOLMOS[0]])
def test_a_cache_that_cannot_be_written_is_a_model_error(tmp_path: Path, model: str) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ModelError, match="cache_dir"):
        locate(model, blocked, "dummy")


def test_a_cached_model_is_located_without_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert locate_cached(MOLMOS[0], tmp_path) is None
    assert locate_cached(STUB, tmp_path) is None
    repository = tmp_path / "hub" / f"models--{MOLMOS[0].replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert locate_cached(MOLMOS[0], tmp_path) == snapshot
    with pytest.raises(ModelError, match="not a directory"):
        locate_cached("no such model", tmp_path)
    with pytest.raises(ModelError, match="not a directory"):
        locate_cached("x" * 300, tmp_path)


def test_a_full_disk_is_a_model_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(directory: Path) -> None:
        directory.mkdir()
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(synthetic, "write_stub", write)
    with pytest.raises(ModelError, match="Free 1 GB"):
        locate(STUB, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", MOLMOS)
def test_dummy_weights_of_a_known_model_need_no_download(name: str, tmp_path: Path) -> None:
    directory = locate(name, tmp_path, "dummy")
    assert directory.is_relative_to(tmp_path) and not list(directory.glob("*.safetensors"))
    config = read_config(directory)
    family_of(config).check(config, directory, "dummy")
    for part, sizes in KNOWN[name].items():
        assert not isinstance(sizes, dict) or config[part].items() >= sizes.items(), part
    assert replace(model_shape(directory), name=name) == model_shape(name)
    # Image tokens come after the real number of tokens.
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    if config["model_type"] == "molmo":
        rows, tokens = config["embedding_size"], [*IMAGE_TOKENS]
    else:
        rows, tokens = config["text_config"]["vocab_size"], [*synthetic2.IMAGE_TOKENS]
        assert config["image_patch_id"] == rows + 2
    assert [tokenizer.token_to_id(one) for one in tokens] == [*range(rows, rows + len(tokens))]
    ids = tokenizer.encode(" User: hi<im_patch>").ids
    assert ids[-1] == rows + 2 and max(ids[:-1]) < rows
