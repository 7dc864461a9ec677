"""Formats: near the original, the same in pieces, and never larger than planned."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from molmo_edge.errors import QuantizeError
from molmo_edge.quantize import formats
from molmo_edge.quantize.formats import format_of, pack, unpack
from tests.quantize.support import SCHEMES, TYPICAL, threads


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threads(1):
        yield


@pytest.mark.parametrize("scheme", SCHEMES)
def test_unpacked_values_are_near_the_original(scheme: str) -> None:
    form = format_of(scheme)
    weight = torch.randn(96, 512, generator=torch.Generator().manual_seed(1)) * 0.02
    packed = pack(weight, form)
    error = float((unpack(packed.tensors, form) - weight).norm() / weight.norm())
    assert error == pytest.approx(packed.relative_error, rel=1e-3)
    assert error < TYPICAL[scheme]
    assert sum(t.nbytes for t in packed.tensors.values()) <= form.stored_bytes(weight.shape)


@pytest.mark.parametrize("scheme", ["fp8", "w4a16"])
def test_packing_twice_changes_nothing(scheme: str) -> None:
    form = format_of(scheme)
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(2))
    # Levels from -8 to 7 in every group, as quantised weights have them.
    levels = (weight * 3).round().clamp(-8, 7)
    levels[:, ::128] = -8
    once = levels * 0.125 if scheme == "w4a16" else unpack(pack(weight, form).tensors, form)
    assert pack(once, form).relative_error < 1e-6


@pytest.mark.parametrize("scheme", ["w4a16", "nvfp4"])
def test_searched_scales_beat_covering_ones(scheme: str) -> None:
    form = format_of(scheme)
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(4))
    plain = pack(weight, dataclasses.replace(form, search=(1.0,))).relative_error
    assert pack(weight, form).relative_error < 0.95 * plain


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_are_packed_equally_in_one_piece_and_in_many(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = format_of(scheme)
    weight = torch.randn(100, 256, generator=torch.Generator().manual_seed(5))
    whole = pack(weight, form).tensors
    monkeypatch.setattr(formats, "_VALUES", 16 * 256)
    parts = pack(weight, form).tensors
    for name, tensor in whole.items():
        assert torch.equal(tensor.view(torch.uint8), parts[name].view(torch.uint8)), name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_and_outliers_survive(scheme: str) -> None:
    form = format_of(scheme)
    weight = torch.zeros(32, 256)
    assert not unpack(pack(weight, form).tensors, form).any()
    weight[3, 7] = 1000.0
    back = unpack(pack(weight, form).tensors, form)
    assert float(back[3, 7]) == pytest.approx(1000.0, rel=0.05)
    weight[3, 7] = 0
    back[3, 7] = 0
    assert torch.equal(back, weight)


def test_columns_that_are_not_a_multiple_of_the_group_are_refused() -> None:
    with pytest.raises(QuantizeError, match="multiple of the 128"):
        format_of("w4a16").check("x.weight", (64, 200))
