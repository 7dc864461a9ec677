"""What is measured of a quantised copy on a CPU has the copy's weights."""

from __future__ import annotations

from pathlib import Path

import quantize as script
import torch

from molmo_edge.models.molmo2.synthetic import hub_config, write_checkpoint
from molmo_edge.quantize import quantize
from tests.quantize.support import plain_tensors, tensors_of


def test_an_unpacked_copy_has_the_stored_values_and_the_original_layout(tmp_path: Path) -> None:
    text = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1}
    original = write_checkpoint(
        tmp_path / "original", hub_config(text=text, vit={"num_hidden_layers": 9})
    )
    copy = quantize(original, tmp_path / "copy", "w4a16").directory
    unpacked = script.unpacked(original, copy, "w4a16", "fp8")
    ours, right = tensors_of(unpacked), plain_tensors(copy, "w4a16")
    assert ours.keys() == right.keys() == tensors_of(original).keys()
    assert all(torch.equal(ours[name].float(), right[name].float()) for name in right)
    assert (unpacked / "config.json").read_text() == (original / "config.json").read_text()
