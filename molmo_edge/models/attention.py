"""Attention for models whose image tokens see each other: Molmo 2 and Gemma 3.

In Gemma 3 the tokens of one image see each other, in Molmo 2 those of all images and video frames
of a request; text between images is causal, as everywhere. vLLM's CPU backend is causal throughout
and its Triton backend knows images one by one, and the answers silently differ from the reference.
The backends here let vLLM's kernel compute a step, and then compute the rows of image tokens again.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

# The backend that a model on CUDA must be built with; vLLM prefers others for some devices.
REQUIRED_CUDA_BACKEND = "TRITON_ATTN"
# Rows computed at once; bounds the mask's memory (20 MiB for a sequence of 40,000 tokens).
_ROWS = 512


def register() -> None:
    """Register in place of vLLM's backends; batches without images are computed the same."""
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.CPUImageBackend")
    register_backend(AttentionBackendEnum.TRITON_ATTN, f"{__name__}.TritonImageBackend")


def supports(backend: type[AttentionBackend]) -> bool:
    """Return whether a layer of this backend lets image tokens see each other as they should."""
    return issubclass(backend, CPUImageBackend | TritonImageBackend)


class ImageRows(NamedTuple):
    """The image tokens of one request in a step."""

    request: int  # index in the batch
    rows: torch.Tensor  # of the batch, int64 (n,)
    positions: torch.Tensor  # of these tokens in the request, int64 (n,)
    # Of all positions to the last image token, int32 (length,): tokens with the same number see
    # each other; 0 is text.
    images: torch.Tensor


def image_rows(common: CommonAttentionMetadata, joint: bool) -> list[ImageRows]:
    """Return the image tokens of each request of a step that has some.

    Args:
        common: `mm_req_doc_ranges` has the first and last position of each run of image tokens.
        joint: all image tokens of a request see each other, not those of each run alone.

    Raises:
        RuntimeError: The step ends before tokens that its image tokens have to see.
    """
    starts = common.query_start_loc_cpu.tolist()
    parts = []
    for request, runs in (common.mm_req_doc_ranges or {}).items():
        # Exact for requests that are being prefilled.
        length = int(common.seq_lens_cpu_upper_bound[request])
        computed = length - (starts[request + 1] - starts[request])  # in earlier steps
        ends = [last for start, last in runs if start < length and last >= computed]
        if not ends:
            continue
        end = 1 + max([last for _, last in runs] if joint else ends)
        if end > length:
            raise RuntimeError(
                f"vLLM's step ends at token {length} of a request, inside its images, which end "
                f"at token {end}: their tokens must see each other. Set max_num_batched_tokens "
                "to at least max_model_len and disable_chunked_mm_input=True, or "
                "enable_chunked_prefill=False."
            )
        images = torch.zeros(end, dtype=torch.int32)
        for number, (start, last) in enumerate(runs, 1):
            images[start : last + 1] = 1 if joint else number
        positions = images[computed:].nonzero()[:, 0] + computed
        parts.append(ImageRows(request, positions - computed + starts[request], positions, images))
    return parts


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    part: ImageRows,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Return the attention of image tokens to tokens before them and to their images.

    `query` is of the part's tokens, (n, heads, dim), `keys` and `values` of all tokens from the
    request's first, (length, kv_heads, dim). A token sees `window` tokens back, itself included,
    apart from its images.
    """
    n = len(query)
    _, kv_heads, dim = keys.shape
    # (kv_heads, heads of the same keys, tokens, dim): keys are shared, not repeated.
    q = query.view(n, kv_heads, -1, dim).permute(1, 2, 0, 3)
    k, v = (x.transpose(0, 1)[:, None].expand(-1, q.shape[1], -1, -1) for x in (keys, values))
    places = torch.arange(len(keys), device=keys.device)
    output = torch.empty_like(query)
    for first in range(0, n, _ROWS):
        rows = slice(first, first + _ROWS)
        row = part.positions[rows, None]
        allowed = places <= row
        if window is not None:
            allowed &= places > row - window
        allowed |= part.images == part.images[row]
        seen = scaled_dot_product_attention(q[:, :, rows], k, v, attn_mask=allowed, scale=scale)
        output[rows] = seen.permute(2, 0, 1, 3).flatten(1, 2)
    return output


class ImageBuilder(AttentionMetadataBuilder):  # type: ignore[misc]
    """Adds `images` to the metadata: the parts of a step that are computed again."""

    # Whether vLLM's kernel lets the tokens of each run see each other.
    masks_runs = False

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        common = common_attn_metadata
        joint = self.vllm_config.model_config.hf_config.model_type == "molmo2"
        parts = image_rows(common, joint)
        # The kernel goes through all runs for every tile, so it gets those that matter alone.
        runs = {part.request: common.mm_req_doc_ranges[part.request] for part in parts}
        if self.masks_runs:
            runs = {i: r for i, r in runs.items() if len(r) == 1 or not joint}
            parts = [part for part in parts if part.request not in runs]
        common = dataclasses.replace(common, mm_req_doc_ranges=runs)
        metadata = super().build(common_prefix_len, common, fast_build)
        metadata.images = [
            ImageRows(part.request, *(x.to(self.device) for x in part[1:])) for part in parts
        ]
        return metadata


class ImageImpl(AttentionImpl):  # type: ignore[misc]
    """Runs vLLM's kernel over the batch, then computes its image tokens again.

    `cached` of a backend reads the keys and values, (length, kv_heads, dim) each, of a request's
    first tokens from its `blocks`, the request's row of the block table.
    """

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        **scales: torch.Tensor | None,
    ) -> torch.Tensor:
        super().forward(layer, query, key, value, kv_cache, attn_metadata, output, **scales)
        # No metadata at all while vLLM warms up.
        for part in getattr(attn_metadata, "images", ()):
            blocks = attn_metadata.block_table[part.request]
            keys, values = self.cached(layer, kv_cache, blocks, len(part.images))
            output[part.rows] = attend(
                dense(query[part.rows], layer._q_scale, output.dtype),
                dense(keys, layer._k_scale, output.dtype),
                dense(values, layer._v_scale, output.dtype),
                part,
                self.scale,
                layer.sliding_window,
            )
        return output


def dense(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return FP8 values in `dtype`; others unchanged."""
    return x if x.dtype == dtype else (x.float() * scale).to(dtype)


class CPUImageImpl(ImageImpl, CPUAttentionBackendImpl):  # type: ignore[misc]
    """Reads vLLM's CPU cache, whose layout depends on the instruction set."""

    _places: torch.Tensor | None = None

    def cached(
        self, layer: Any, kv_cache: torch.Tensor, blocks: torch.Tensor, length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._places is None:
            self._places = self.places(layer, kv_cache)
        block = kv_cache[blocks[: -(-length // kv_cache.shape[2])]].flatten(2)
        # (block, kv_head, key or value, token, dim) to (key or value, token, kv_head, dim).
        tokens = block[..., self._places].permute(2, 0, 3, 1, 4).flatten(1, 2)
        return tokens[0, :length], tokens[1, :length]

    def places(self, layer: Any, kv_cache: torch.Tensor) -> torch.Tensor:
        """Return the places of keys and values in a block of one head, (2, tokens, dim).

        Found by writing numbers with vLLM's own kernel, whose layouts are not documented.
        """
        _, kv_heads, tokens, width = kv_cache.shape
        if kv_cache.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise RuntimeError("The FP8 KV cache of vLLM's CPU backend cannot be used with images.")
        codes_dtype = torch.int32 if kv_cache.dtype == torch.float32 else torch.int16
        codes = torch.arange(tokens * width, dtype=torch.int32).to(codes_dtype)
        pair = codes.view(kv_cache.dtype).view(2, tokens, 1, -1).repeat(1, 1, kv_heads, 1)
        scratch = torch.zeros_like(kv_cache[:1])
        self.do_kv_cache_update(layer, pair[0], pair[1], scratch, torch.arange(tokens))
        found, places = scratch[0, 0].flatten().view(codes_dtype).sort()
        if not torch.equal(found, codes.unique()):
            raise RuntimeError("The layout of vLLM's KV cache is unknown; use another version.")
        # Codes beyond 32767 are negative and stand first.
        return places.roll(int((codes >= 0).sum())).view(2, tokens, -1)


class CPUImageBuilder(ImageBuilder, CPUAttentionMetadataBuilder): ...  # type: ignore[misc]


class CPUImageBackend(CPUAttentionBackend):  # type: ignore[misc]
    """vLLM's CPU backend, with image tokens that see each other."""

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return True

    @staticmethod
    def get_impl_cls() -> type[CPUImageImpl]:
        return CPUImageImpl

    @staticmethod
    def get_builder_cls() -> type[CPUImageBuilder]:
        return CPUImageBuilder


class TritonImageImpl(ImageImpl, TritonAttentionImpl):  # type: ignore[misc]
    """Reads vLLM's Triton cache."""

    def cached(
        self, layer: Any, kv_cache: torch.Tensor, blocks: torch.Tensor, length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # (block, kv_head, token, key and value).
        tokens = kv_cache[blocks[: -(-length // kv_cache.shape[2])]]
        if self.kv_cache_dtype.startswith("fp8"):
            tokens = tokens.view(self.fp8_dtype)
        keys, values = tokens.transpose(1, 2).flatten(0, 1)[:length].chunk(2, dim=-1)
        return keys, values

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        # The rows computed again are written as they are.
        return False


class TritonImageBuilder(ImageBuilder, TritonAttentionMetadataBuilder):  # type: ignore[misc]
    """See `ImageBuilder`."""

    masks_runs = True

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        # A CUDA graph of a step with images would leave the second part out.
        if vllm_config.model_config.is_mm_prefix_lm:
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return super().get_cudagraph_support(vllm_config, kv_cache_spec)


class TritonImageBackend(TritonAttentionBackend):  # type: ignore[misc]
    """vLLM's Triton backend, with image tokens that see each other across images."""

    @staticmethod
    def get_impl_cls() -> type[TritonImageImpl]:
        return TritonImageImpl

    @staticmethod
    def get_builder_cls() -> type[TritonImageBuilder]:
        return TritonImageBuilder
