"""Geometry equals the reference implementation's, for every tiling and any size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo_edge.models.molmo.prompts import ImageTokenIds
from molmo_edge.models.molmo.tiling import Tiling, largest_tiling, select_tiling
from molmo_edge.reference.molmo_inputs import select_tiling as reference_tiling

IDS = ImageTokenIds(start=1, end=2, patch=3, col=4)


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 32))
def test_tilings_are_the_references(height: int, width: int, max_crops: int) -> None:
    assert select_tiling(height, width, max_crops) == reference_tiling(height, width, max_crops)


@pytest.mark.parametrize("size", [(112, 112), (112, 500), (500, 112), (1, 1), (1, 4000), (113, 5)])
def test_sizes_at_the_margin_pick_without_warning(size: tuple[int, int]) -> None:
    assert select_tiling(*size) == reference_tiling(*size, 12)


def test_each_tiling_places_every_feature_once() -> None:
    for rows in range(1, 13):
        for cols in range(1, 12 // rows + 1):
            tiling = Tiling(rows, cols)
            tokens = tiling.tokens(IDS)
            assert len(tokens) == tiling.n_tokens
            placed = tiling.input_idx[tiling.input_idx >= 0]
            assert sorted(placed.tolist()) == np.flatnonzero(tokens == IDS.patch).tolist()


def test_two_crops_side_by_side_drop_their_inner_edges() -> None:
    # Worked by hand: 12 rows of 20 = 10 + 10 pooled features; the grid starts after
    # <im_start>, 12 x 13 tokens, <im_end>, <im_start>.
    idx = Tiling(1, 2).input_idx.reshape(3, 12, 12)
    first = 1 + 12 * 13 + 2
    assert idx[1, 0].tolist() == [*range(first, first + 10), -100, -100]
    assert idx[2, 0].tolist() == [-100, -100, *range(first + 10, first + 20)]
    assert idx[1, 1, 0] == first + 21


def test_the_largest_tiling_has_the_most_tokens() -> None:
    # One column of twelve: 2 + 156 + 2 + 100 x 13.
    assert largest_tiling(12).n_tokens == 1460
    assert Tiling(3, 4).n_tokens == 2 + 156 + 2 + 28 * 37


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 9000), st.integers(1, 9000))
def test_fitted_images_stay_inside_the_canvas(height: int, width: int) -> None:
    view = Tiling(1, 2).fit(height, width)
    assert min(view.height, view.width) >= 1
    assert 0 <= view.top <= view.top + view.height <= 336
    assert 0 <= view.left <= view.left + view.width <= 560
