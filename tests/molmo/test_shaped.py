"""Descriptions of the published models, for weights that are made up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from molmo_edge.devices.checkpoint import model_shape
from molmo_edge.errors import ModelError
from molmo_edge.models.hub import locate
from molmo_edge.models.molmo.layout import check_layout, read_config
from molmo_edge.models.molmo.shaped import ensure_shaped, is_known, shape_of

MOLMOS = ("allenai/Molmo-7B-D-0924", "allenai/Molmo-7B-O-0924", "allenai/Molmo-72B-0924")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("name", MOLMOS)
def test_a_description_has_the_models_sizes_and_a_layout_we_take(name: str, root: Path) -> None:
    folder = ensure_shaped(name, root)
    check_layout(read_config(folder))
    assert replace(model_shape(folder), name=name) == model_shape(name)
    assert not list(folder.glob("*.safetensors"))


def test_image_tokens_lie_behind_the_real_number_of_tokens(root: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(ensure_shaped(MOLMOS[0], root) / "tokenizer.json"))
    rows = shape_of(MOLMOS[0])[1].embedding_size
    assert tokenizer.token_to_id("<im_start>") == rows
    ids = tokenizer.encode(" User: hi<im_patch>").ids
    assert ids[-1] == tokenizer.token_to_id("<im_patch>") and max(ids[:-1]) < rows


def test_gemma_and_unknown_names_have_no_description() -> None:
    assert all(is_known(name) for name in MOLMOS)
    assert not is_known("google/gemma-3-4b-it") and not is_known("somebody/else")


def test_dummy_weights_of_a_known_model_need_no_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = locate(MOLMOS[1], tmp_path, "dummy")
    assert folder.is_relative_to(tmp_path)
    assert locate(MOLMOS[1], tmp_path, "dummy") == folder


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ModelError, match="cannot be written"):
        ensure_shaped(MOLMOS[0], blocked)
