"""CPU attention for models whose image tokens see each other, such as Gemma 3.

vLLM's CPU backend is causal throughout: an image's tokens see only those before them, and the
answers silently differ from the reference. This backend computes the rows of images again, as
short sequences of their own that end with the image and are not causal.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend


def register() -> None:
    """Register in place of vLLM's CPU backend; batches without images are computed the same."""
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.PrefixLMBackend")


class PrefixLMBackend(CPUAttentionBackend):  # type: ignore[misc]
    """vLLM's CPU backend, with bidirectional attention inside images."""

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return True

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return PrefixLMImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return PrefixLMBuilder


class PrefixLMBuilder(CPUAttentionMetadataBuilder):  # type: ignore[misc]
    """Adds `images` to the metadata of steps that prefill some."""

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CPUAttentionMetadata:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        # Rows of the batch, and one sequence per image with its queries in the order of the rows.
        metadata.images = None
        if images := image_sequences(common_attn_metadata):
            rows, sequences = images
            metadata.images = rows, super().build(0, sequences, True)
        return metadata


class PrefixLMImpl(CPUAttentionBackendImpl):  # type: ignore[misc]
    """Runs vLLM's kernel over the batch, then over its images."""

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        scales = output_scale, output_block_scale
        super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *scales)
        # None while vLLM warms up, without metadata at all.
        if images := getattr(attn_metadata, "images", None):
            rows, metadata = images
            part = torch.empty_like(output[rows])
            super().forward(layer, query[rows], key, value, kv_cache, metadata, part, *scales)
            output[rows] = part
        return output


def image_sequences(
    common: CommonAttentionMetadata,
) -> tuple[torch.Tensor, CommonAttentionMetadata] | None:
    """The rows of images in a step's batch, and a sequence for each, ending with the image."""
    query_start, seq_lens = common.query_start_loc_cpu.tolist(), common.seq_lens.tolist()
    requests, rows, lengths = [], [], []
    # First and last position of each image's tokens, by request.
    for request, images in (common.mm_req_doc_ranges or {}).items():
        first_row, length = query_start[request], seq_lens[request]
        computed = length - (query_start[request + 1] - first_row)  # in earlier steps
        for start, last in images:
            begin, end = max(start, computed), min(last + 1, length)
            if begin < end:
                requests.append(request)
                rows.append(torch.arange(begin, end) + first_row - computed)
                lengths.append(end)
    if not rows:
        return None
    counts = torch.tensor([0, *map(len, rows)], dtype=common.query_start_loc.dtype)
    starts = counts.cumsum(0, dtype=counts.dtype)
    sequences = dataclasses.replace(
        common,
        num_reqs=len(rows),
        num_actual_tokens=int(starts[-1]),
        max_query_len=int(counts.max()),
        max_seq_len=max(lengths),
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(lengths, dtype=common.seq_lens.dtype),
        block_table_tensor=common.block_table_tensor[torch.tensor(requests)],
        causal=False,
    )
    return torch.cat(rows), sequences
