"""Formats: near the original, the same in pieces, and never larger than planned."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from molmo_edge.errors import QuantizeError
from molmo_edge.quantize import formats
from molmo_edge.quantize.formats import format_of, pack, unpack
from tests.quantize.support import SCHEMES, TYPICAL


def normal(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_unpacked_values_are_near_the_original(scheme: str) -> None:
    form, weight = format_of(scheme), normal(96, 512) * 0.02
    tensors, relative_error = pack(weight, form)
    error = float((unpack(tensors, form) - weight).norm() / weight.norm())
    assert error == pytest.approx(relative_error, rel=1e-3)
    assert error < TYPICAL[scheme]
    planned = form.stored_bytes("x", tuple(weight.shape))
    assert sum(tensor.nbytes for tensor in tensors.values()) <= planned
    if form.bits == 4:  # searched scales beat covering ones
        assert relative_error < 0.95 * pack(weight, dataclasses.replace(form, search=(1.0,)))[1]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_are_packed_equally_in_one_piece_and_in_many(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    form, weight = format_of(scheme), normal(100, 256)
    whole, _ = pack(weight, form)
    monkeypatch.setattr(formats, "_VALUES", 16 * 256)
    parts, _ = pack(weight, form)
    for name, tensor in whole.items():
        assert torch.equal(tensor.view(torch.uint8), parts[name].view(torch.uint8)), name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_and_outliers_survive(scheme: str) -> None:
    form, weight = format_of(scheme), torch.zeros(32, 256)
    assert not unpack(pack(weight, form)[0], form).any()
    weight[3, 7] = 1000.0
    back = unpack(pack(weight, form)[0], form)
    assert float(back[3, 7]) == pytest.approx(1000.0, rel=0.05)
    weight[3, 7] = back[3, 7] = 0
    assert torch.equal(back, weight)


def test_columns_that_are_not_a_multiple_of_the_group_are_refused() -> None:
    with pytest.raises(QuantizeError, match="multiple of the 128"):
        format_of("w4a16").stored_bytes("x.weight", (64, 200))
