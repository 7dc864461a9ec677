"""vLLM's Molmo 2, corrected; registered by the plugin under the same architecture name.

What stock vLLM computes differently from AllenAI's reference, and what corrects it:

1. image features *replace* the `<im_patch>` embedding instead of being added to it
   (`embed_multimodal`);
2. image tokens see their own image or frame alone, on the CPU not even that; in the reference they
   see all image tokens of the prompt (`molmo_edge.models.attention`);
3. images of one prompt are cached and scheduled apart, though they depend on each other
   (`inputs.engine_input`, `vllm_workarounds.prefill_in_one_step`);
4. text prompts get no BOS (`Molmo2Info.get_default_tok_params`);
5. frames of a video are embedded with other start and end tokens than the prompt has: here the
   embeddings are those of the prompt's own tokens;
6. linear layers are built without their names, so that a quantised checkpoint cannot leave some of
   them out (`SelfAttention`, `FeedForward`), and a quantised LM head is not recognised
   (`models/head.py`);
7. `prompt_logprobs` and penalties read logits of image tokens, which have none (`compute_logits`);
8. its server samples a video file by frame number, the reference by time (`video_files`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.inputs.engine import MultiModalInput
from vllm.model_executor.layers.activation import MulAndSilu
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models import molmo2 as stock
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataParser, VideoProcessorItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
)
from vllm.renderers import TokenizeParams
from vllm.sequence import IntermediateTensors

from molmo_edge.errors import ConfigError
from molmo_edge.models import attention
from molmo_edge.models.hashing import digest
from molmo_edge.models.head import quantised_head
from molmo_edge.models.molmo2.config import ImageIds, Processing
from molmo_edge.models.molmo2.inputs import (
    FRAMES_AT_ONCE,
    Modality,
    Pixels,
    engine_input,
    frame_visuals,
    image_visuals,
)
from molmo_edge.models.molmo2.prompts import frame_tokens, image_tokens
from molmo_edge.models.molmo2.tiling import Tiling
from molmo_edge.models.nan import checked_logits, ignore_bitmask_warning
from molmo_edge.models.processor_options import processor_options
from molmo_edge.models.prompts import bos_id
from molmo_edge.models.tiling import candidates
from molmo_edge.video import VideoLimits, load_video, sample_indices

# What a request or the engine may set through `mm_processor_kwargs`.
_OPTIONS = frozenset({"max_crops"})


@dataclass(frozen=True)
class PromptWithBos(TokenizeParams):  # type: ignore[misc]
    """Tokenises text as vLLM does, after putting BOS in front of it."""

    bos: str = ""

    def with_kwargs(self, **kwargs: Any) -> PromptWithBos:
        return PromptWithBos(**vars(super().with_kwargs(**kwargs)), bos=self.bos)

    def apply_pre_tokenization(self, tokenizer: Any, prompt: Any) -> Any:
        prompt = super().apply_pre_tokenization(tokenizer, prompt)
        if not prompt["prompt"].startswith(self.bos):
            prompt["prompt"] = self.bos + prompt["prompt"]
        return prompt


class Molmo2Info(BaseProcessingInfo):  # type: ignore[misc]
    """Answers vLLM's questions about tokens and sizes with our processor's own geometry."""

    @cached_property
    def ids(self) -> ImageIds:
        return ImageIds.from_config(self.get_hf_config().to_dict())

    @cached_property
    def processing(self) -> Processing:
        return Processing.read(Path(self.ctx.model_config.model))

    @cached_property
    def bos(self) -> int:
        return bos_id(self.get_tokenizer())

    def max_crops(self, kwargs: Mapping[str, object]) -> int:
        """`max_crops` with the engine's and one request's `mm_processor_kwargs`."""
        options = processor_options(self, kwargs, _OPTIONS, "Molmo 2")
        value = options.get("max_crops", self.processing.max_crops)
        if type(value) is not int or value < 1:
            raise ConfigError(f"max_crops must be an integer of at least 1, not {value}.")
        return value

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        return {"text_kwargs": set(), "images_kwargs": set(_OPTIONS)}

    def get_data_parser(self) -> MultiModalDataParser:
        return MultiModalDataParser(video_needs_metadata=True)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None, "video": 1}

    def get_default_tok_params(self) -> TokenizeParams:
        params = super().get_default_tok_params()
        text = self.get_tokenizer().convert_ids_to_tokens(self.bos)
        return PromptWithBos(**vars(params), bos=text)

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        # Of the dummy inputs. The encoder cache holds a whole prompt, so larger items fit too.
        image = len(image_tokens(self.largest_tiling, self.ids, self.processing))
        frames = FRAMES_AT_ONCE * len(frame_tokens(self.ids, self.processing))
        sizes = {"image": min(image, seq_len), "video": min(frames, seq_len)}
        return {modality: sizes[modality] for modality in mm_counts}

    @cached_property
    def largest_tiling(self) -> Tiling:
        """The tiling with the most tokens."""
        geometry = self.processing.geometry
        tilings = [Tiling(geometry, *pair) for pair in candidates(self.max_crops({})).tolist()]
        return max(tilings, key=lambda tiling: len(image_tokens(tiling, self.ids, self.processing)))


class Molmo2Dummies(BaseDummyInputsBuilder[Molmo2Info]):  # type: ignore[misc]
    """The inputs with which vLLM measures memory: what the vision tower computes at once."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return "<|image|>" * mm_counts.get("image", 0) + "<|video|>" * mm_counts.get("video", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]
    ) -> dict[str, Any]:
        patch_px = self.info.processing.geometry.patch_px
        height, width = (n * patch_px for n in self.info.largest_tiling.patches)
        side = self.info.processing.geometry.crop_px
        frames = np.zeros((FRAMES_AT_ONCE, side, side, 3), np.uint8)
        metadata = {"fps": 1.0, "frames_indices": list(range(FRAMES_AT_ONCE))}
        image = np.zeros((height, width, 3), np.uint8)
        return {
            "image": [image] * mm_counts.get("image", 0),
            "video": [(frames, metadata)] * mm_counts.get("video", 0),
        }


class Molmo2Inputs(BaseMultiModalProcessor[Molmo2Info]):  # type: ignore[misc]
    """Turns the images or the video of a prompt into one multimodal item."""

    def apply(self, inputs: Any, timing_ctx: Any) -> MultiModalInput:
        """Replace `<|image|>` and `<|video|>` in the prompt by image tokens."""
        info, items = self.info, inputs.mm_data_items
        tokenizer = info.get_tokenizer()
        counts = items.get_all_counts()
        n_images, n_videos = counts.get("image", 0), counts.get("video", 0)
        if n_videos > 1 or (n_videos and n_images):
            raise ValueError("Molmo 2 takes several images or one video per prompt.")
        if not (n_images or n_videos):
            raise ValueError("multi_modal_data is empty; leave it out for a text prompt.")
        if n_images:
            images = [_pixels(image) for image in items.get_items("image", ImageProcessorItems)]
            max_crops = info.max_crops(inputs.hf_processor_mm_kwargs)
            geometry = info.processing.geometry
            tilings = [geometry.tiling(*image.shape[:2], max_crops) for image in images]
            pieces = [image_tokens(one, info.ids, info.processing).tolist() for one in tilings]
            # vLLM calls this before its CPU backend starts, which fails once numba is imported
            # (models/vllm_workarounds.py).
            visuals = image_visuals(images, tilings, compiled=False)
            modality: Modality = "image"
            hashed = digest(images, max_crops)
        else:
            [(frames, metadata)] = items.get_items("video", VideoProcessorItems)
            sampled, times = self._sample(frames, metadata, inputs.hf_processor_mm_kwargs)
            frame = frame_tokens(info.ids, info.processing).tolist()
            pieces = [[]]
            for number, seconds in enumerate(times):
                text = f"{' ' if number else ''}{seconds:.1f} "
                pieces[0] += [*tokenizer.encode(text, add_special_tokens=False), *frame]
            visuals = frame_visuals(sampled, info.processing.geometry, compiled=False)
            modality = "video"
            hashed = digest(sampled, "video")
        ids = inputs.prompt if inputs.prompt[:1] == [info.bos] else [info.bos, *inputs.prompt]
        placeholder = tokenizer.convert_tokens_to_ids(f"<|{modality}|>")
        if ids.count(placeholder) != len(pieces):
            raise ValueError(
                f"The prompt must have one <|{modality}|> for each {modality}: {len(pieces)}."
            )
        parts = iter(pieces)
        ids = [i for token in ids for i in (next(parts) if token == placeholder else [token])]
        return engine_input(ids, info.ids, modality, visuals, hashed)[0]

    def _sample(
        self, frames: Any, metadata: Mapping[str, Any], kwargs: Mapping[str, object]
    ) -> tuple[list[Pixels], list[float]]:
        """Frames and times: of a file by time, of an array by index unless it has been sampled."""
        processing = self.info.processing
        if "file" in metadata:  # see video_files.py
            limits = VideoLimits(max_frames=processing.max_frames, max_fps=processing.max_fps)
            clip = load_video(metadata["file"], limits)
            return list(clip.frames), list(clip.times)
        fps: Any = metadata.get("fps")
        indices: Any = metadata.get("frames_indices")
        number = isinstance(fps, (int, float, np.integer, np.floating))
        if not len(frames) or not number or not 1e-6 < fps < math.inf:
            raise ValueError("A video must have frames, and `fps` above 0 in its metadata.")
        default = metadata.get("do_sample_frames", indices is None)
        if kwargs.get("do_sample_frames", default) or indices is None:
            indices = sample_indices(len(frames), fps, processing.max_frames, processing.max_fps)
            frames = [frames[i] for i in indices]
        times = np.asarray(indices, np.float64) / float(fps)
        if times.shape != (len(frames),):
            raise ValueError("A video's `frames_indices` must have one index for each frame.")
        return [_pixels(frame) for frame in frames], times.tolist()

    # `apply` needs neither.

    def _get_mm_fields_config(self, *_: Any) -> Mapping[str, Any]:
        raise NotImplementedError

    def _get_prompt_updates(self, *_: Any) -> Sequence[Any]:
        raise NotImplementedError


def _pixels(image: Any) -> Pixels:
    """RGB pixels, (height, width, 3) uint8, of a PIL image, an array or a tensor."""
    array = np.asarray(image.convert("RGB") if hasattr(image, "convert") else image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ValueError("An image must be a PIL image or an array height x width x 3 of uint8.")
    return array


class SelfAttention(nn.Module):  # type: ignore[misc]
    """Attention of one decoder layer."""

    def __init__(self, vllm_config: VllmConfig, layer: int, prefix: str) -> None:
        super().__init__()
        if get_tensor_model_parallel_world_size() > 1:
            raise ConfigError("molmo_edge's Molmo 2 runs on one device: tensor_parallel_size=1.")
        config = vllm_config.model_config.hf_config.text_config
        linear: dict[str, Any] = {"bias": False, "quant_config": vllm_config.quant_config}
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.sizes = [heads * self.head_dim, kv_heads * self.head_dim, kv_heads * self.head_dim]
        hidden = config.hidden_size
        self.qkv_proj = QKVParallelLinear(
            hidden, self.head_dim, heads, kv_heads, prefix=f"{prefix}.qkv_proj", **linear
        )
        self.o_proj = RowParallelLinear(self.sizes[0], hidden, prefix=f"{prefix}.o_proj", **linear)
        self.norm_by_head = config.qk_norm_type == "qwen3"
        q_size, k_size = (self.head_dim,) * 2 if self.norm_by_head else self.sizes[:2]
        self.q_norm = RMSNorm(q_size, eps=config.layer_norm_eps)
        self.k_norm = RMSNorm(k_size, eps=config.layer_norm_eps)
        rope = config.rope_parameters
        if config.rope_scaling_layers is not None and layer not in config.rope_scaling_layers:
            rope = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
        self.rotary_emb = get_rope(
            self.head_dim, max_position=config.max_position_embeddings, rope_parameters=rope
        )
        self.attn = Attention(
            heads,
            self.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden)
        q, k, v = qkv.split(self.sizes, dim=-1)
        q, k = self._normed(self.q_norm, q), self._normed(self.k_norm, k)
        q, k = self.rotary_emb(positions, q, k)
        output, _ = self.o_proj(self.attn(q, k, v))
        return output

    def _normed(self, norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if not self.norm_by_head:
            return norm(x)
        return norm(x.reshape(*x.shape[:-1], -1, self.head_dim)).view(x.shape)


class FeedForward(nn.Module):  # type: ignore[misc]
    """Feed-forward network of one decoder layer; the activation is that of the second half."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config.text_config
        hidden, inner = config.hidden_size, config.intermediate_size
        linear: dict[str, Any] = {"bias": False, "quant_config": vllm_config.quant_config}
        self.up_gate_proj = MergedColumnParallelLinear(
            hidden, [inner] * 2, prefix=f"{prefix}.up_gate_proj", **linear
        )
        self.act = MulAndSilu()
        self.down_proj = RowParallelLinear(inner, hidden, prefix=f"{prefix}.down_proj", **linear)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        up_gate, _ = self.up_gate_proj(hidden)
        output, _ = self.down_proj(self.act(up_gate))
        return output


class DecoderLayer(nn.Module):  # type: ignore[misc]
    """One block of the language model, with the norms before (Qwen 3) or after (OLMo 3)."""

    def __init__(self, vllm_config: VllmConfig, layer: int, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config.text_config
        self.self_attn = SelfAttention(vllm_config, layer, f"{prefix}.self_attn")
        self.mlp = FeedForward(vllm_config, f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.norm_after = config.norm_after

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        if self.norm_after:
            hidden = hidden + self.input_layernorm(self.self_attn(positions, hidden))
            return hidden + self.post_attention_layernorm(self.mlp(hidden))
        hidden = hidden + self.self_attn(positions, self.input_layernorm(hidden))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": -1, "inputs_embeds": 0})  # type: ignore[misc]
class LanguageModel(nn.Module):  # type: ignore[misc]
    """The language model, without its head."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config.text_config
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size + config.additional_vocab_size, config.hidden_size
        )
        self.layers = nn.ModuleList(
            DecoderLayer(vllm_config, layer, f"{prefix}.layers.{layer}")
            for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.layer_norm_eps)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.layers:
            hidden = layer(positions, hidden)
        return self.norm(hidden)

    def load_weights(self, weights: Any) -> set[str]:
        loaded: set[str] = AutoWeightsLoader(self).load_weights(weights)
        return loaded


@MULTIMODAL_REGISTRY.register_processor(Molmo2Inputs, info=Molmo2Info, dummy_inputs=Molmo2Dummies)
class Molmo2ForConditionalGeneration(stock.Molmo2ForConditionalGeneration):  # type: ignore[misc]
    """vLLM's Molmo 2 with the reference's merge and attention; one device."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)
        # Here and not in the plugin: other models keep vLLM's own backends.
        attention.register()
        ignore_bitmask_warning()
        self.config = config = vllm_config.model_config.hf_config
        self.multimodal_config = vllm_config.model_config.multimodal_config
        text = config.text_config
        with self._mark_tower_model(vllm_config, {"image", "video"}):
            self.vision_backbone = stock.Molmo2VisionBackbone(
                stock.VitConfig(**_fields(stock.VitConfig, config.vit_config)),
                stock.AdapterConfig(**_fields(stock.AdapterConfig, config.adapter_config)),
                vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "vision_backbone"),
            )
        with self._mark_language_model(vllm_config):
            self.model = LanguageModel(
                vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model")
            )
        self.img_patch_id = config.image_patch_id
        sizes = text.vocab_size, text.hidden_size
        self.lm_head = quantised_head(vllm_config, *sizes, "lm_head") or ParallelLMHead(*sizes)
        self.logits_processor = LogitsProcessor(text.vocab_size)
        if vllm_config.model_config.is_mm_prefix_lm:
            self._check_attention(vllm_config.cache_config.cache_dtype)

    def _check_attention(self, kv_cache_dtype: str) -> None:
        backend = self.model.layers[0].self_attn.attn.get_attn_backend()
        if not attention.supports(backend):
            raise ConfigError(
                f"vLLM's attention backend {backend.get_name()} cannot let the image tokens of a "
                "prompt see each other, and answers would be wrong: use "
                f"attention_backend={attention.REQUIRED_CUDA_BACKEND}."
            )
        if kv_cache_dtype.endswith("per_token_head"):
            raise ConfigError(
                f"kv_cache_dtype={kv_cache_dtype} has no scales that image tokens of several "
                "images could be read with; use fp8 or auto."
            )

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return checked_logits(super().compute_logits(hidden_states), self.config)

    def embed_multimodal(self, **kwargs: Any) -> list[torch.Tensor]:
        """Embeddings of the image tokens of each item: their own plus, for patches, a feature."""
        if not kwargs:
            return []
        pixels, pooling = kwargs["pixel_values"], kwargs["token_pooling"]
        features, crop, row = [], 0, 0
        for n_crops, n_features in kwargs["group_sizes"].tolist():
            features.append(
                self.vision_backbone(
                    images=pixels[None, crop : crop + n_crops],
                    token_pooling=pooling[None, row : row + n_features],
                )
            )
            crop, row = crop + n_crops, row + n_features
        tokens = kwargs["visual_tokens"]
        embeddings = self.model.embed_input_ids(tokens)
        embeddings[tokens == self.img_patch_id] += torch.cat(features)
        return list(embeddings.split(kwargs["num_tokens"].flatten().tolist()))


def _fields(schema: Any, config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in fields(schema)}
