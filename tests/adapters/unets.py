"""Small models of Stable Diffusion's kind, and random factors of adapters for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optpass.testing import randomised

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


def small_unet() -> Any:
    """Attention in the first of two levels, 1×1 convolutions around it, as SD 1.5 has them."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return randomised(
        UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=8,
            attention_head_dim=2,
            norm_num_groups=4,
        ).eval()
    )


def small_text_encoder() -> Any:
    """CLIP's text model, two layers."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=40,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
    )
    return randomised(CLIPTextModel(config).eval())


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def factors(model: Any, targets: tuple[str, ...], rank: int = 2) -> dict[str, tuple[Tensor, Tensor]]:
    """Random ``down`` and ``up`` for every layer of ``model`` whose path ends as one of ``targets``."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for path, module in model.named_modules():
        if not path.endswith(targets) or not hasattr(module, "weight"):
            continue
        shape = module.weight.shape
        down = torch.randn((rank, *shape[1:]), generator=generator) * 0.3
        up = torch.randn((shape[0], rank, *(1,) * (len(shape) - 2)), generator=generator) * 0.3
        found[path] = down, up
    return found
