"""Which Molmo 2 checkpoints can be run, and how they take images and videos.

Imports neither torch, transformers nor vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from molmo_edge.checkpoint_files import processor_settings, read_json
from molmo_edge.devices.tensors import TEXT_DEFAULTS, VIT_DEFAULTS
from molmo_edge.errors import ModelError
from molmo_edge.models.molmo2.tiling import Geometry

# Of Molmo2-4B and 8B (Qwen 3), and of Molmo2-O-7B (OLMo 3).
Layout = Literal["4b", "o-7b"]

ARCHITECTURE = "Molmo2ForConditionalGeneration"
SUPPORTED = (
    "Supported Molmo 2 models: Molmo2-4B, Molmo2-8B, Molmo2-O-7B, Molmo2-ER, Molmo2-VideoPoint and "
    f"fine-tunes of the same class ({ARCHITECTURE})."
)
# Relatives with another class, by the start of their model type.
_RELATIVES = {
    "molmopoint": "MolmoPoint points with tokens whose number depends on the image, computed by a "
    "head of its own, which vLLM cannot run; AllenAI's code runs it.",
    "molmoact2": "MolmoAct2 outputs robot actions, computed by a flow-matching expert, which vLLM "
    "cannot run; LeRobot runs it. Its vision-language part is Molmo2-ER.",
    "molmoact": "MolmoAct has another architecture than Molmo; AllenAI's code runs it.",
}

_IDS = (
    "image_start_token_id",
    "image_end_token_id",
    "image_patch_id",
    "image_col_id",
    "low_res_image_start_token_id",
    "image_low_res_id",
    "frame_start_token_id",
    "frame_end_token_id",
)
# A checkpoint may not say otherwise: the models here compute only this.
_FIXED: Mapping[str, Mapping[str, Any]] = {
    "adapter_config": {"pooling_attention_mask": True, "hidden_act": "silu"},
    "text_config": {"hidden_act": "silu", "qkv_bias": False, "use_qk_norm": True},
}
# Of an image of a hundred megapixels, each pixel seen as it is.
_MOST_CROPS = 1024
_PIXELS = {"do_convert_rgb": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}


class ImageIds(NamedTuple):
    """Token ids of the image tokens of one checkpoint; they all see each other."""

    start: int
    end: int
    patch: int
    col: int
    low_res_start: int
    low_res: int
    frame_start: int
    frame_end: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read them from a `config.json`."""
        return cls(*(int(config[name]) for name in _IDS))


def check_layout(config: Mapping[str, Any]) -> None:
    """Raise ModelError for a `config.json` that the model would compute wrongly."""
    if refusal := relative(config):
        raise ModelError(refusal)
    architectures = config.get("architectures") or [ARCHITECTURE]
    if config.get("model_type") != "molmo2" or ARCHITECTURE not in architectures:
        raise ModelError(f"Class {architectures[0]} is not Molmo 2. {SUPPORTED}")
    if "vision_config" in config:
        raise ModelError(
            "config.json has the field names of transformers' own Molmo 2 (vision_config), and the "
            "tensors are named accordingly. Use the checkpoint with the hub's names (vit_config)."
        )
    parts = ("vit_config", "adapter_config", "text_config")
    if missing := [p for p in parts if not isinstance(config.get(p), Mapping)]:
        raise ModelError(f"config.json lacks {', '.join(missing)}. {SUPPORTED}")
    text = {**TEXT_DEFAULTS, **config["text_config"]}
    sizes = text["vocab_size"], text["additional_vocab_size"]
    rows = sum(size for size in sizes if isinstance(size, int))
    if wrong := [name for name in _IDS if config.get(name) not in range(rows)]:
        raise ModelError(
            f"config.json has no {', '.join(wrong)} among the {rows} tokens of its text_config. "
            f"{SUPPORTED}"
        )
    wrong = [
        f"{part}.{key}={config[part][key]!r} (must be {value!r})"
        for part, fixed in _FIXED.items()
        for key, value in fixed.items()
        if config[part].get(key, value) != value
    ]
    if config.get("tie_word_embeddings"):
        wrong.append("tie_word_embeddings=True (must be False)")
    if (norm := config["text_config"].get("qk_norm_type", "qwen3")) not in ("qwen3", "olmo"):
        wrong.append(f"text_config.qk_norm_type={norm!r} (must be 'qwen3' or 'olmo')")
    if wrong:
        raise ModelError(f"This Molmo 2 layout is not supported: {', '.join(wrong)}. {SUPPORTED}")


def relative(config: Mapping[str, Any]) -> str | None:
    """Why a relative of Molmo 2 with another class cannot be run, None for everything else."""
    names = [config.get("model_type"), *(config.get("architectures") or ())]
    plain = [str(name).lower().replace("_", "") for name in names]
    for start, reason in _RELATIVES.items():
        if any(name.startswith(start) for name in plain):
            return reason
    return None


@dataclass(frozen=True)
class Processing:
    """What the processor files of a checkpoint say.

    The defaults are the published files'; `read` has those of AllenAI's classes.
    """

    geometry: Geometry = field(default_factory=Geometry)
    max_crops: int = 8  # of an image in high resolution, the global view not counted
    # Whether a column token ends each row of the high-resolution part, the global view, a frame.
    cols: bool = True
    base_cols: bool = False
    frame_cols: bool = False
    base_start: bool = True  # whether the global view starts with a token of its own
    frame_tokens: bool = False  # whether frames have start and end tokens of their own
    max_frames: int = 384  # sampled from a video
    max_fps: float = 2.0  # sampled per second

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read the processor files of a checkpoint; AllenAI's classes give what they leave out.

        Raises ModelError if one is broken, or describes another processing than Molmo 2's.
        """
        config = read_json(directory / "config.json")
        image, video = (processor_settings(directory, kind) for kind in ("image", "video"))
        flags = processor_settings(directory)
        vit = {**VIT_DEFAULTS, **config.get("vit_config", {})}
        crops, patch = vit["image_default_input_size"], vit["image_patch_size"]
        crop = crops[0] if isinstance(crops, list) and crops else crops
        pixels = {**_PIXELS, "size": {"height": crop, "width": crop}, "patch_size": patch}
        _check(image, pixels, "preprocessor_config.json")
        pixels["frame_sample_mode"] = "uniform_last_frame"
        _check(video, pixels, "video_preprocessor_config.json")
        cols = bool(flags.get("image_use_col_tokens", True))
        base_cols = flags.get("use_single_crop_col_tokens")
        try:
            processing = cls(
                Geometry(
                    crop_px=int(crop),
                    patch_px=int(patch),
                    pool=_side(image.get("pooling_size", 2)),
                    frame_pool=_side(video.get("pooling_size", 3)),
                    margin_patches=tuple(image.get("overlap_margins", (4, 4))),
                ),
                max_crops=int(image.get("max_crops", 8)),
                cols=cols,
                base_cols=cols if base_cols is None else bool(base_cols),
                frame_cols=bool(flags.get("video_use_col_tokens", False)),
                base_start=bool(flags.get("use_single_crop_start_token", True)),
                frame_tokens=bool(flags.get("use_frame_special_tokens", True)),
                max_frames=int(video.get("num_frames", 384)),
                max_fps=float(video.get("max_fps", 2)),
            )
            processing._check_ranges()
        except (TypeError, ValueError, OverflowError) as exc:
            raise ModelError(
                "preprocessor_config.json or video_preprocessor_config.json contains a wrong value "
                f"({exc}). Download the checkpoint again."
            ) from exc
        return processing

    def _check_ranges(self) -> None:
        geometry = self.geometry
        if min(geometry.patch_px, geometry.pool, geometry.frame_pool) < 1 or geometry.n_patches < 1:
            raise ValueError("crops, patches and pooling windows must have a size")
        margins = geometry.margin_patches
        if len(margins) != 2 or min(margins) < 0 or geometry.stride_patches < 1:
            raise ValueError("overlap_margins must be two numbers that leave a part of each crop")
        if not 1 <= self.max_crops <= _MOST_CROPS:
            raise ValueError(f"max_crops must be 1 to {_MOST_CROPS}")
        if self.max_frames < 1 or not 0 < self.max_fps < math.inf:
            raise ValueError("num_frames and max_fps must be positive")


def _side(size: Any) -> int:
    """The side of a square window, given as one number or two."""
    height, width = size if isinstance(size, list) else (size, size)
    if height != width:
        raise ValueError("pooling windows must be square")
    return int(height)


def _check(stated: Mapping[str, Any], expected: Mapping[str, Any], file: str) -> None:
    for name, value in expected.items():
        if stated.get(name, value) != value:
            raise ModelError(f"{file}: {name} must be {value} for Molmo 2, not {stated[name]}.")
