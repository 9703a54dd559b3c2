"""Diffusers models: denoisers and autoencoders of images and clips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from case import Case
from torch import nn

CONFIGS = Path(__file__).parent.parent / "configs"


def published(name: str) -> dict[str, Any]:
    """A config that lies in ``tests/configs``."""
    config: dict[str, Any] = json.loads((CONFIGS / name / "config.json").read_text("utf-8"))
    return config


def config(class_name: str, **values: Any) -> dict[str, Any]:
    """A config of one diffusers class."""
    return {"_class_name": class_name, **values}


SD15 = config(
    "UNet2DConditionModel",
    sample_size=8,
    block_out_channels=(8, 16),
    norm_num_groups=4,
    layers_per_block=1,
    attention_head_dim=4,
    cross_attention_dim=12,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)
SDXL = {
    **SD15,
    "use_linear_projection": True,
    "transformer_layers_per_block": 2,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32,
}
SDXL_FULL = config(
    "UNet2DConditionModel",
    sample_size=128,
    block_out_channels=(320, 640, 1280),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    use_linear_projection=True,
    transformer_layers_per_block=(1, 2, 10),
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
)
SVD = config(
    "UNetSpatioTemporalConditionModel",
    sample_size=8,
    num_frames=2,
    block_out_channels=(32, 64),
    layers_per_block=1,
    num_attention_heads=(2, 4),
    cross_attention_dim=16,
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=24,
    down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    transformer_layers_per_block=1,
)
FLUX = config(
    "FluxTransformer2DModel",
    in_channels=4,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=12,
    pooled_projection_dim=8,
    axes_dims_rope=(4, 6, 6),
    guidance_embeds=True,
)
FLUX_FULL = config(
    "FluxTransformer2DModel",
    in_channels=64,
    num_layers=19,
    num_single_layers=38,
    attention_head_dim=128,
    num_attention_heads=24,
    joint_attention_dim=4096,
    pooled_projection_dim=768,
    guidance_embeds=True,
)
SD3 = config(
    "SD3Transformer2DModel",
    sample_size=8,
    num_layers=2,
    attention_head_dim=8,
    num_attention_heads=2,
    in_channels=4,
    out_channels=4,
    joint_attention_dim=16,
    caption_projection_dim=16,
    pooled_projection_dim=8,
    pos_embed_max_size=24,
)
SD3_FULL = config(
    "SD3Transformer2DModel",
    sample_size=128,
    patch_size=2,
    in_channels=16,
    out_channels=16,
    num_layers=24,
    attention_head_dim=64,
    num_attention_heads=24,
    joint_attention_dim=4096,
    caption_projection_dim=1536,
    pooled_projection_dim=2048,
    pos_embed_max_size=192,
)
SD35 = {**SD3, "qk_norm": "rms_norm", "dual_attention_layers": (0,)}
SD35_FULL = {
    **SD3_FULL,
    "qk_norm": "rms_norm",
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
}
WAN = config(
    "WanTransformer3DModel",
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=8,
    freq_dim=16,
    ffn_dim=16,
    num_layers=2,
)
WAN_FULL = config(
    "WanTransformer3DModel",
    num_attention_heads=12,
    attention_head_dim=128,
    in_channels=16,
    out_channels=16,
    text_dim=4096,
    freq_dim=256,
    ffn_dim=8960,
    num_layers=30,
)
WAN_IMAGE = {**WAN, "in_channels": 9, "image_dim": 8, "added_kv_proj_dim": 24}
WAN_IMAGE_FULL = {
    **WAN_FULL,
    "num_attention_heads": 40,
    "in_channels": 36,
    "ffn_dim": 13824,
    "num_layers": 40,
    "image_dim": 1280,
    "added_kv_proj_dim": 5120,
}
LTX = config(
    "LTXVideoTransformer3DModel",
    in_channels=8,
    out_channels=8,
    num_attention_heads=2,
    attention_head_dim=16,
    cross_attention_dim=32,
    num_layers=2,
    caption_channels=12,
)
HUNYUAN = config(
    "HunyuanVideoTransformer3DModel",
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=10,
    num_layers=1,
    num_single_layers=1,
    num_refiner_layers=1,
    text_embed_dim=12,
    pooled_projection_dim=8,
    rope_axes_dim=(2, 4, 4),
)
COGVIDEOX = config(
    "CogVideoXTransformer3DModel",
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    time_embed_dim=8,
    text_embed_dim=12,
    num_layers=2,
    sample_width=12,
    sample_height=8,
    sample_frames=9,
    max_text_seq_length=6,
)
COGVIDEOX_5B_FULL = config(
    "CogVideoXTransformer3DModel", num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True
)
PIXART = config(
    "PixArtTransformer2DModel",
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=8,
    num_layers=2,
    cross_attention_dim=24,
    sample_size=8,
    caption_channels=12,
    use_additional_conditions=True,
)
PIXART_FULL = config("PixArtTransformer2DModel", sample_size=128, caption_channels=4096, interpolation_scale=2)
DIT = config(
    "DiTTransformer2DModel",
    sample_size=8,
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=8,
    in_channels=4,
    out_channels=8,
    num_embeds_ada_norm=10,
)
DIT_FULL = config("DiTTransformer2DModel", sample_size=32, out_channels=8)
LATTE = config(
    "LatteTransformer3DModel",
    num_attention_heads=2,
    attention_head_dim=8,
    in_channels=4,
    out_channels=8,
    num_layers=2,
    cross_attention_dim=16,
    attention_bias=True,
    sample_size=8,
    patch_size=2,
    activation_fn="gelu-approximate",
    num_embeds_ada_norm=1000,
    norm_type="ada_norm_single",
    norm_elementwise_affine=False,
    norm_eps=1e-6,
    caption_channels=12,
    video_length=3,
)
LATTE_FULL = {
    **LATTE,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "sample_size": 64,
    "caption_channels": 4096,
    "video_length": 16,
}
QWEN = config(
    "QwenImageTransformer2DModel",
    in_channels=8,
    out_channels=2,
    num_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=12,
    axes_dims_rope=(4, 6, 6),
)
CONTROLNET = config(
    "ControlNetModel",
    block_out_channels=(8, 16),
    norm_num_groups=4,
    layers_per_block=1,
    attention_head_dim=4,
    cross_attention_dim=12,
    conditioning_embedding_out_channels=(4, 8),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
)
VAE_KL = config(
    "AutoencoderKL",
    sample_size=16,
    block_out_channels=(8, 16),
    norm_num_groups=4,
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
)
VAE_KL_FULL = config(
    "AutoencoderKL",
    sample_size=512,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
)
VAE_WAN = config("AutoencoderKLWan", base_dim=8, z_dim=16, dim_mult=(1, 2, 2, 2), num_res_blocks=1)
TAESD = config(
    "AutoencoderTiny",
    encoder_block_out_channels=(8, 8),
    decoder_block_out_channels=(8, 8),
    num_encoder_blocks=(1, 1),
    num_decoder_blocks=(1, 1),
)


def vae_kl_decoder() -> nn.Module:
    from diffusers import AutoencoderKL

    decoder: nn.Module = AutoencoderKL.from_config(VAE_KL).decoder
    return decoder


def vae_kl_encoder() -> nn.Module:
    from diffusers import AutoencoderKL

    encoder: nn.Module = AutoencoderKL.from_config(VAE_KL).encoder
    return encoder


IMAGE = ("batch", "height", "width", "tokens")
CLIP = ("batch", "frames", "height", "width")
NUMBERS = "as a number, which a graph cannot keep open"
OTHER_HEIGHTS = {"height": (10, 20)}
OWN_HEIGHT = "open heights leave out the config's own, for which the model takes a stored table"
CHANNELS = {"dynamic:sample[1]": r"at conv_in: Given groups=1"}

CASES = [
    Case(
        "SD 1.5 UNet",
        SD15,
        {"sample": (2, 4, 8, 12)},
        IMAGE,
        full=published("sd15-unet"),
        published=859.52e6,
    ),
    Case("SDXL UNet", SDXL, {"sample": (2, 4, 8, 12)}, IMAGE, full=SDXL_FULL, published=2567.46e6),
    Case(
        "SVD UNet",
        SVD,
        {"sample": (2, 4, 8, 8, 12)},
        CLIP,
        full=published("svd-unet"),
        published=1524.62e6,
        spans={"frames": (2, 8)},
    ),
    Case(
        "Flux.1",
        FLUX,
        {"hidden_states": (2, 24, 4), "encoder_hidden_states": (2, 5, 12)},
        ("batch", "image_tokens", "tokens"),
        spans={"batch": (2, 4)},
        full=FLUX_FULL,
        published=11.901e9,
    ),
    Case(
        "SD 3 medium",
        SD3,
        {"hidden_states": (2, 4, 8, 12), "encoder_hidden_states": (2, 5, 16)},
        IMAGE,
        full=SD3_FULL,
        published=2.085e9,
    ),
    Case(
        "SD 3.5 medium",
        SD35,
        {"hidden_states": (2, 4, 8, 12), "encoder_hidden_states": (2, 5, 16)},
        IMAGE,
        full=SD35_FULL,
        published=2.47e9,
    ),
    Case(
        "Wan 2.1 text-to-video 1.3B",
        WAN,
        {"hidden_states": (2, 4, 3, 8, 12), "encoder_hidden_states": (2, 5, 8)},
        (*CLIP, "tokens"),
        full=WAN_FULL,
        published=1.419e9,
    ),
    Case(
        "Wan 2.1 image-to-video 14B",
        WAN_IMAGE,
        {"hidden_states": (2, 9, 3, 8, 12)},
        CLIP,
        full=WAN_IMAGE_FULL,
        published=16.397e9,
    ),
    Case(
        "LTX-Video",
        LTX,
        {"frames": (2,), "height": (3,), "width": (5,), "encoder_hidden_states": (2, 7, 12)},
        ("batch", "tokens"),
        full=config("LTXVideoTransformer3DModel"),
        published=1.923e9,
        limits={f"dynamic:{name}": NUMBERS for name in ("frames", "height", "width")},
    ),
    Case(
        "HunyuanVideo",
        HUNYUAN,
        {"hidden_states": (2, 4, 3, 8, 12), "encoder_hidden_states": (2, 7, 12)},
        (*CLIP, "tokens"),
        full=config("HunyuanVideoTransformer3DModel"),
        published=12.82e9,
    ),
    Case(
        "CogVideoX 2B",
        COGVIDEOX,
        {"hidden_states": (2, 2, 4, 8, 10)},
        ("batch", "frames"),
        full=config("CogVideoXTransformer3DModel"),
        published=1.694e9,
        limits={f"dynamic:{name}": f"the model's code fixes {name} at" for name in ("height", "width")},
    ),
    Case(
        "CogVideoX 5B",
        {**COGVIDEOX, "use_rotary_positional_embeddings": True},
        {"hidden_states": (2, 3, 4, 8, 12)},
        ("batch", "frames"),
        full=COGVIDEOX_5B_FULL,
        published=5.570e9,
        limits={f"dynamic:frames,{name}": "only one can stay open" for name in ("height", "width")},
        spans={"frames": (2, 6)},
    ),
    Case(
        "PixArt-α",
        PIXART,
        {"hidden_states": (2, 4, 10, 12), "encoder_hidden_states": (2, 5, 12)},
        IMAGE,
        full=PIXART_FULL,
        published=611.35e6,
        spans=OTHER_HEIGHTS,
        note=OWN_HEIGHT,
    ),
    Case(
        "PixArt-Σ",
        {**PIXART, "use_additional_conditions": False},
        {"hidden_states": (2, 4, 10, 12), "encoder_hidden_states": (2, 5, 12)},
        IMAGE,
        spans=OTHER_HEIGHTS,
        note=OWN_HEIGHT,
    ),
    Case(
        "DiT-XL/2",
        DIT,
        {"hidden_states": (3, 4, 8, 8)},
        ("batch",),
        full=DIT_FULL,
        published=749.83e6,
        # The port takes the root of the number of tokens for height and width.
        limits={f"dynamic:{name}": rf"takes only some sizes of {name}" for name in ("height", "width")},
        note="square only; diffusers' port holds the embeddings of timestep and class once a block: 675 M in the paper",
    ),
    Case(
        "Latte-1",
        LATTE,
        {"hidden_states": (2, 4, 3, 8, 12), "encoder_hidden_states": (2, 5, 12)},
        IMAGE,
        full=LATTE_FULL,
        published=1.056e9,
        limits={"dynamic:frames": "the model's code fixes frames at"},
        spans={"height": (10, 16)},
        note=OWN_HEIGHT,
    ),
    Case(
        "Qwen-Image",
        QWEN,
        {"height": (4,), "width": (6,), "encoder_hidden_states": (2, 5, 12)},
        ("batch",),
        full=config("QwenImageTransformer2DModel"),
        published=20.43e9,
        limits={
            **{f"dynamic:{name}": NUMBERS for name in ("height", "width")},
            "dynamic:tokens": "the model's code fixes tokens at",
        },
        spans={"batch": (2, 4)},
    ),
    Case(
        "ControlNet (SD 1.5)",
        CONTROLNET,
        {"sample": (2, 4, 8, 12)},
        IMAGE,
        full=config("ControlNetModel", cross_attention_dim=768),
        published=361.28e6,
    ),
    Case(
        "VAE-KL",
        VAE_KL,
        {"sample": (2, 3, 16, 24)},
        ("batch", "height", "width"),
        full=VAE_KL_FULL,
        published=83.65e6,
    ),
    Case(
        "VAE-KL decoder",
        {},
        {"sample": (2, 4, 8, 12)},
        ("sample[0]", "sample[2]", "sample[3]"),
        factory=vae_kl_decoder,
        limits=CHANNELS,
    ),
    Case(
        "VAE-KL encoder",
        {},
        {"sample": (2, 3, 16, 24)},
        ("sample[0]", "sample[2]", "sample[3]"),
        factory=vae_kl_encoder,
        limits=CHANNELS,
    ),
    Case(
        "VAE-Wan",
        VAE_WAN,
        {"sample": (2, 3, 5, 16, 24)},
        ("batch", "height", "width"),
        full=config("AutoencoderKLWan"),
        published=126.9e6,
        limits={"dynamic:frames": "takes frames from 2 to 4, not 2..10"},
        spans={"height": (16, 32), "width": (16, 48)},
    ),
    Case(
        "AutoencoderTiny (TAESD)",
        TAESD,
        {"sample": (2, 3, 16, 8)},
        ("batch", "height", "width"),
        full=config("AutoencoderTiny"),
        published=2.445e6,
    ),
]
