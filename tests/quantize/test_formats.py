"""Formats: near the original, and the same in pieces."""

from __future__ import annotations

import pytest
import torch

from molmo_edge.quantize import formats
from molmo_edge.quantize.formats import FORMATS, pack, unpack


@pytest.mark.parametrize("scheme", FORMATS)
def test_a_weight_is_packed_alike_in_one_piece_and_in_many(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = FORMATS[scheme]
    weight = torch.randn(100, 256, generator=torch.Generator().manual_seed(1))
    whole, error = pack(weight, form)
    monkeypatch.setattr(formats, "_VALUES", 16 * 256)
    pieces, _ = pack(weight, form)
    for name, tensor in whole.items():
        assert torch.equal(tensor.view(torch.uint8), pieces[name].view(torch.uint8)), name
    monkeypatch.setattr(formats, "_SEARCH", (1.0,))
    if form.bits == 4:  # searched scales beat covering ones
        assert error < 0.95 * pack(weight, form)[1]


@pytest.mark.parametrize("scheme", FORMATS)
def test_zeros_and_outliers_survive(scheme: str) -> None:
    form, weight = FORMATS[scheme], torch.zeros(32, 256)
    assert not unpack(pack(weight, form)[0], form).any()
    weight[3, 7] = 1000.0
    back = unpack(pack(weight, form)[0], form)
    assert float(back[3, 7]) == pytest.approx(1000.0, rel=0.05)
    weight[3, 7] = back[3, 7] = 0
    assert torch.equal(back, weight)
