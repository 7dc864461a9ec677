"""Image tokens see each other as in the reference, and nothing else changes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec

from molmo_edge.models import attention

HEADS, KV_HEADS, DIM, BLOCK = 4, 2, 32, 32
CPU = torch.device("cpu")


class Sequence(NamedTuple):
    computed: int  # tokens of earlier steps
    length: int  # tokens of these and of this step
    runs: list[tuple[int, int]]  # first and last image token


# A whole prompt; text; a prefix that ends inside an image, and one after; an answer's next token.
BATCH = [
    Sequence(0, 150, [(1, 40), (44, 44), (50, 120)]),
    Sequence(0, 33, []),
    Sequence(64, 140, [(3, 30), (40, 130)]),
    Sequence(32, 70, [(1, 20), (33, 60)]),
    Sequence(99, 100, [(1, 20), (33, 60)]),
]


def config(model_type: str, dtype: torch.dtype) -> Any:
    vllm_config = VllmConfig()
    vllm_config.model_config = SimpleNamespace(
        dtype=dtype,
        hf_config=SimpleNamespace(model_type=model_type),
        get_num_attention_heads=lambda parallel: HEADS,
        get_num_kv_heads=lambda parallel: KV_HEADS,
        get_head_size=lambda: DIM,
        rswa_window=None,
    )
    return vllm_config


def builder(cls: Any, vllm_config: Any, dtype: torch.dtype = torch.float32) -> Any:
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=KV_HEADS, head_size=DIM, dtype=dtype)
    return cls(spec, [], vllm_config, CPU)


def step(batch: list[Sequence]) -> CommonAttentionMetadata:
    """A step's metadata; blocks of the requests alternate in the cache, block 0 is not used."""
    counts = [s.length - s.computed for s in batch]
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    blocks = 1 + torch.arange(len(batch) * 5).view(5, -1).T.contiguous()
    positions = torch.cat([torch.arange(s.computed, s.length) for s in batch])
    requests = torch.arange(len(batch)).repeat_interleave(torch.tensor(counts))
    lengths = torch.tensor([s.length for s in batch]).int()
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        seq_lens_cpu_upper_bound=lengths,
        num_reqs=len(batch),
        num_actual_tokens=int(starts[-1]),
        max_query_len=max(counts),
        max_seq_len=int(lengths.max()),
        block_table_tensor=blocks.int(),
        slot_mapping=blocks[requests, positions // BLOCK] * BLOCK + positions % BLOCK,
        mm_req_doc_ranges={i: list(s.runs) for i, s in enumerate(batch)},
    )


def expected(q: Any, k: Any, v: Any, sequence: Sequence, joint: bool, window: int | None) -> Any:
    """Dense attention of the last tokens of a sequence, in float64."""
    image = torch.zeros(sequence.length)
    for number, (start, last) in enumerate(sequence.runs, 1):
        image[start : last + 1] = 1 if joint else number
    seen = torch.ones(sequence.length, sequence.length, dtype=torch.bool).tril()
    if window:
        seen = seen.triu(1 - window)
    seen |= (image[:, None] == image) & (image > 0)
    k, v = (x.double().repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * DIM**-0.5
    weights = scores.masked_fill(~seen[sequence.computed :], -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


@pytest.mark.parametrize(
    ("model_type", "window", "dtype", "bound"),
    [
        ("molmo2", None, torch.float32, 1e-5),
        ("molmo2", None, torch.bfloat16, 2e-2),
        ("gemma3", None, torch.float32, 1e-5),
        ("gemma3", 24, torch.float32, 1e-5),
    ],
)
def test_a_step_on_the_cpu_is_dense_attention_with_the_references_mask(
    model_type: str,
    window: int | None,
    dtype: torch.dtype,
    bound: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    current_platform.import_kernels()
    monkeypatch.setattr(attention, "_ROWS", 50)
    vllm_config = config(model_type, dtype)
    with set_current_vllm_config(vllm_config):
        impl = attention.CPUImageImpl(HEADS, DIM, DIM**-0.5, KV_HEADS, None, window, "auto")
    metadata_builder = builder(attention.CPUImageBuilder, vllm_config, dtype)
    scale = torch.tensor(1.0)
    layer = SimpleNamespace(
        isa=metadata_builder.isa, sliding_window=window, _k_scale_float=1.0, _v_scale_float=1.0,
        _q_scale=scale, _k_scale=scale, _v_scale=scale,
    )  # fmt: skip
    torch.manual_seed(0)
    cache = torch.zeros(26, KV_HEADS, BLOCK, 2 * DIM, dtype=dtype)
    q = [torch.randn(s.length - s.computed, HEADS, DIM).to(dtype) for s in BATCH]
    k, v = ([torch.randn(s.length, KV_HEADS, DIM).to(dtype) for s in BATCH] for _ in range(2))
    # The keys and values of this and of earlier steps are in the cache.
    slots = step([s._replace(computed=0) for s in BATCH]).slot_mapping
    impl.do_kv_cache_update(layer, torch.cat(k), torch.cat(v), cache, slots)

    output = torch.zeros_like(torch.cat(q))
    metadata = metadata_builder.build(0, step(BATCH))
    # vLLM's kernel looks at neither this step's keys nor its values.
    impl.forward(layer, torch.cat(q), None, None, cache, metadata, output)
    for i, part in enumerate(output.split([len(x) for x in q])):
        want = expected(q[i], k[i], v[i], BATCH[i], model_type == "molmo2", window)
        assert (part.double() - want).abs().max() < bound, BATCH[i]


def test_steps_that_end_inside_images_are_refused() -> None:
    runs = [(1, 20), (30, 50)]
    for joint, computed, length, rows in (
        (True, 0, 51, 41),
        (True, 25, 60, 21),
        (True, 0, 1, None),  # before the images
        (True, 51, 60, None),
        (False, 0, 25, 20),
        (False, 0, 30, 20),
    ):
        parts = attention.image_rows(step([Sequence(computed, length, runs)]), joint)
        assert [len(part.rows) for part in parts] == ([rows] if rows else [])
    for joint, computed, length in ((True, 0, 21), (True, 0, 50), (False, 0, 20), (False, 25, 31)):
        with pytest.raises(RuntimeError, match="inside its images"):
            attention.image_rows(step([Sequence(computed, length, runs)]), joint)


def test_tritons_kernel_gets_the_images_that_it_masks_itself() -> None:
    batch = [*BATCH, Sequence(0, 50, [(1, 40)]), Sequence(60, 61, [(1, 40)])]
    for model_type, alone, again in (("molmo2", [5], [0, 2, 3]), ("gemma3", [0, 2, 3, 5], [])):
        metadata = builder(
            attention.TritonImageBuilder, config(model_type, torch.float32)
        ).build(0, step(batch))  # fmt: skip
        assert metadata.mm_prefix_range == {i: batch[i].runs for i in alone}
        assert [part.request for part in metadata.images] == again


def test_the_largest_blocks_of_the_cpus_cache_are_read_in_order() -> None:
    """65536 numbers: as many as 16 bits can tell apart."""
    current_platform.import_kernels()
    with set_current_vllm_config(config("gemma3", torch.bfloat16)):
        impl = attention.CPUImageImpl(1, 256, 1.0, 1, None, None, "auto")
    layer = SimpleNamespace(isa="vec", _k_scale_float=1.0, _v_scale_float=1.0)
    pair = torch.randn(2, 200, 1, 256).bfloat16()
    cache = torch.zeros(3, 1, 128, 512).bfloat16()
    slots = torch.cat([torch.arange(256, 384), torch.arange(72)])
    impl.do_kv_cache_update(layer, *pair, cache, slots)
    got = impl.cached(layer, cache, torch.tensor([2, 0, 1]), 190)
    assert torch.equal(torch.stack([*got]), pair[:, :190])


def test_tritons_cache_is_read_in_order() -> None:
    with set_current_vllm_config(config("molmo2", torch.float32)):
        plain, fp8 = (
            attention.TritonImageImpl(HEADS, DIM, 1.0, KV_HEADS, None, None, dtype)
            for dtype in ("auto", "fp8")
        )
    pair = torch.randn(2, 3 * BLOCK, KV_HEADS, DIM)
    blocks = torch.tensor([2, 0, 3, 1])  # the last one is not this request's
    cache = torch.zeros(4, KV_HEADS, BLOCK, 2 * DIM)
    cache[blocks[:3]] = torch.cat([*pair], -1).view(3, BLOCK, KV_HEADS, -1).transpose(1, 2)
    for impl, stored, want in (
        (plain, cache, pair),
        (fp8, cache.to(fp8.fp8_dtype).view(torch.uint8), pair.to(fp8.fp8_dtype).float()),
    ):
        got = impl.cached(None, stored, blocks, 70)
        assert torch.equal(torch.stack([*got]).float(), want[:, :70])
    half = attention.dense(got[0], torch.tensor(0.5), torch.bfloat16)
    assert torch.equal(half, (want[0, :70] / 2).bfloat16())


def test_other_backends_are_known_not_to_fit() -> None:
    cpu, triton = AttentionBackendEnum.CPU_ATTN, AttentionBackendEnum.TRITON_ATTN
    attention.register()
    assert attention.supports(cpu.get_class()) and attention.supports(triton.get_class())
    assert not attention.supports(AttentionBackendEnum.FLEX_ATTENTION.get_class())
    assert not attention.supports(CPUAttentionBackend)
