"""Which rows of a batch are images; the attention itself is tested with Gemma 3."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from molmo_edge.models.cpu_attention import image_spans


def test_a_prefilled_image_is_one_sequence_that_ends_with_it() -> None:
    # Ten tokens at once, the image at 3 … 6.
    assert image_spans({0: [(3, 6)]}, [0, 10], [10]) == [(0, 3, 4, 7)]


def test_rows_count_from_the_start_of_the_batch_and_positions_from_that_of_the_request() -> None:
    # A decoding request, then one whose first 20 of 30 tokens are computed.
    ranges = {0: [(2, 5)], 1: [(4, 9), (22, 25), (27, 29)]}
    assert image_spans(ranges, [0, 1, 11], [40, 30]) == [(1, 3, 4, 26), (1, 8, 3, 30)]


def test_a_image_half_in_the_prefix_cache_is_half_computed() -> None:
    assert image_spans({0: [(6, 13)]}, [0, 8], [16]) == [(0, 0, 6, 14)]


def test_later_steps_have_no_images() -> None:
    assert image_spans({0: [(3, 6)], 1: []}, [0, 1, 4], [11, 3]) == []
    # A step that ends before the image begins.
    assert image_spans({0: [(30, 40)]}, [0, 20], [20]) == []
