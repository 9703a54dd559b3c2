"""Diffusers models: denoisers and autoencoders of images and clips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from case import Case

CONFIGS = Path(__file__).parent.parent / "configs"


def published(name: str) -> dict[str, Any]:
    """A config that lies in ``tests/configs``."""
    config: dict[str, Any] = json.loads((CONFIGS / name / "config.json").read_text("utf-8"))
    return config


SD15 = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": 12,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
SVD = {
    "_class_name": "UNetSpatioTemporalConditionModel",
    "sample_size": 8,
    "num_frames": 2,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "num_attention_heads": (2, 4),
    "cross_attention_dim": 16,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24,
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    "transformer_layers_per_block": 1,
}

CASES = [
    Case("SD 1.5 UNet", SD15, {"sample": (2, 4, 8, 12)}, full=published("sd15-unet"), published=859.52e6),
    Case("SVD UNet", SVD, {"sample": (2, 3, 8, 8, 12)}, full=published("svd-unet"), published=1524.62e6),
]
