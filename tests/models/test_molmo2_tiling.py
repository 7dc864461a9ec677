"""Tilings and pooling windows equal AllenAI's molmo2 code (recorded in golden_extra.json)."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from molmo_edge.models.molmo2.tiling import Geometry
from tests.molmo2_golden import golden

CASES = [{"max_crops": 8, **case} for kind in ("images", "crops") for case in golden("extra")[kind]]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['size']}-{case['max_crops']}")
def test_every_recorded_size_has_the_reference_tiling(case: dict[str, Any]) -> None:
    width, height = case["size"]
    tiling = Geometry().tiling(height, width, case["max_crops"])
    assert [*tiling.base_grid, *tiling.grid] == case["grid"]
    assert tiling.n_crops == case["crops"]
    assert len(tiling.pooling) == np.prod(tiling.base_grid) + np.prod(tiling.grid)
    if "pooling_sha" in case:
        digest = hashlib.sha256(tiling.pooling.tobytes()).hexdigest()
        assert digest.startswith(case["pooling_sha"])


def test_every_patch_of_a_frame_is_in_one_window() -> None:
    geometry = Geometry()
    assert geometry.frame_grid == (9, 9)
    assert geometry.frame_pooling[1].tolist() == [3, 4, 5, 30, 31, 32, 57, 58, 59]
    assert sorted(geometry.frame_pooling.reshape(-1)) == list(range(729))


def test_crops_of_another_size_are_pooled_as_well() -> None:
    # 9 × 9 patches, tiles 5 apart: 14 × 14 patches; the odd global view is padded at its far edge.
    tiling = Geometry(crop_px=126, margin_patches=(2, 2)).tiling(500, 500, 4)
    assert (tiling.rows, tiling.cols, tiling.base_grid, tiling.grid) == (2, 2, (5, 5), (7, 7))
    assert tiling.pooling[4].tolist() == [8, -1, 17, -1]
