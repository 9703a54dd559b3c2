"""Inputs of diffusers models, by family. Default sizes are those that the config was trained at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optpass.capture.inputs import TIMESTEP, TIMESTEPS, Dim, Input, Inputs, Number, Product, input_builder, integers
from optpass.errors import UserError
from optpass.ir.program import InputRange

Config = Mapping[str, Any]

TEXT_TOKENS = 77
CLIP_TOKENS = 257
"""Patches of a 224-pixel image in CLIP's ViT-H/14, and its class token."""
WAN_TEXT_TOKENS = 512
UNIT_TIMESTEPS = Input(("batch",), None, InputRange(0.0, 1.0, "uniform"))
NO_CONDITIONS = {"resolution": None, "aspect_ratio": None}
UNSIZED = 32
"""Latent height and width where a config does not say (``sample_size`` is ``null``)."""


def image_sizes(config: Config, default: int = UNSIZED) -> dict[str, int]:
    """Batch 1 and the height and width of ``sample_size``, a number or a pair."""
    size = config.get("sample_size") or default
    height, width = (size, size) if isinstance(size, int) else size
    return {"batch": 1, "height": height, "width": width}


def halvings(config: Config) -> dict[str, int]:
    """A UNet halves height and width between its blocks and must meet the same sizes on the way up."""
    step = 2 ** (len(config["block_out_channels"]) - 1)
    return {"height": step, "width": step}


def patches(config: Config) -> dict[str, int]:
    """A transformer cuts height and width into patches."""
    step = config.get("patch_size") or 1
    return {"height": step, "width": step}


def image(channels: int) -> Input:
    """[batch, channels, height, width]."""
    return Input(("batch", channels, "height", "width"))


def clip(channels: int) -> Input:
    """[batch, channels, frames, height, width]."""
    return Input(("batch", channels, "frames", "height", "width"))


def text_mask() -> Input:
    """1 for the text tokens to attend to, 0 for padding."""
    return integers(("batch", "tokens"), 2)


@input_builder("UNet2DModel")
def unet_2d(config: Config) -> Inputs:
    """Unconditional or class-conditional image UNet."""
    tensors = {"sample": image(config["in_channels"]), "timestep": TIMESTEP}
    return Inputs(tensors | class_labels(config), image_sizes(config), steps=halvings(config))


@input_builder("UNet2DConditionModel")
def unet_2d_condition(config: Config) -> Inputs:
    """Stable Diffusion 1.x, 2.x and XL.

    Raises:
        UserError: the config's extra conditioning (image embeddings) has no builder yet.
    """
    tensors = {
        "sample": image(config["in_channels"]),
        "timestep": TIMESTEP,
        "encoder_hidden_states": Input(("batch", "tokens", context_width(config))),
    }
    tensors |= class_labels(config) | added_conditions(config)
    return Inputs(tensors, {**image_sizes(config), "tokens": TEXT_TOKENS}, steps=halvings(config))


def context_width(config: Config) -> int:
    """Width of the cross-attention context that the caller passes."""
    width = config.get("encoder_hid_dim") or config["cross_attention_dim"]
    return int(width if isinstance(width, int) else width[0])


def class_labels(config: Config) -> dict[str, Input]:
    """The ``class_labels`` input that a UNet's config asks for."""
    kind, classes = config.get("class_embed_type"), config.get("num_class_embeds")
    if kind in ("projection", "simple_projection"):
        return {"class_labels": Input(("batch", config["projection_class_embeddings_input_dim"]))}
    if kind == "timestep":
        return {"class_labels": TIMESTEPS}
    if kind == "identity":
        return {"class_labels": Input(("batch", config["block_out_channels"][0] * 4))}
    return {"class_labels": integers(("batch",), classes)} if classes else {}


def added_conditions(config: Config) -> dict[str, Input]:
    """SDXL's ``added_cond_kwargs``: pooled text and six numbers of size and crop.

    Raises:
        UserError: the config asks for another kind of added condition.
    """
    kind = config.get("addition_embed_type")
    if kind in (None, "text"):
        return {}
    if kind != "text_time":
        raise UserError(f"addition_embed_type {kind!r} has no input builder; register one for this UNet")
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    return {
        "added_cond_kwargs.text_embeds": Input(("batch", pooled)),
        "added_cond_kwargs.time_ids": Input(("batch", 6), None, InputRange(0.0, 1024.0, "uniform")),
    }


@input_builder("UNetSpatioTemporalConditionModel")
def unet_spatio_temporal(config: Config) -> Inputs:
    """Stable Video Diffusion: one context token a clip; frame rate, motion and noise as ``added_time_ids``."""
    numbers = config["projection_class_embeddings_input_dim"] // config["addition_time_embed_dim"]
    tensors = {
        "sample": Input(("batch", "frames", config["in_channels"], "height", "width")),
        "timestep": TIMESTEP,
        "encoder_hidden_states": Input(("batch", 1, context_width(config))),
        "added_time_ids": Input(("batch", numbers), None, InputRange(0.0, 128.0, "uniform")),
    }
    sizes = {**image_sizes(config), "frames": config.get("num_frames") or 14}
    return Inputs(tensors, sizes, steps=halvings(config))


@input_builder("DiTTransformer2DModel", "Transformer2DModel")
def dit(config: Config) -> Inputs:
    """Class-conditional diffusion transformer, or a cross-attending one over image latents.

    Raises:
        UserError: the transformer works on discrete tokens.
    """
    if config.get("num_vector_embeds"):
        raise UserError("a Transformer2DModel over discrete tokens has no input builder; register one for it")
    tensors = {"hidden_states": image(config["in_channels"])}
    sizes = image_sizes(config)
    if "ada_norm" in config.get("norm_type", ""):
        tensors["timestep"] = TIMESTEPS
        tensors["class_labels"] = integers(("batch",), config["num_embeds_ada_norm"])
    if config.get("cross_attention_dim"):
        tensors["encoder_hidden_states"] = Input(("batch", "tokens", context_width(config)))
        sizes["tokens"] = TEXT_TOKENS
    return Inputs(tensors, sizes, steps=patches(config))


@input_builder("AutoencoderTiny", "AutoencoderKL")
def image_autoencoder(config: Config) -> Inputs:
    """Image → latent → image; the whole ``forward``, the posterior's mean being the latent."""
    return Inputs({"sample": image(config["in_channels"])}, image_sizes(config, 512))


@input_builder("SD3Transformer2DModel")
def sd3_transformer(config: Config) -> Inputs:
    """Stable Diffusion 3: latents, text tokens, pooled text."""
    tensors = {
        "hidden_states": image(config["in_channels"]),
        "encoder_hidden_states": Input(("batch", "tokens", config["joint_attention_dim"])),
        "pooled_projections": Input(("batch", config["pooled_projection_dim"])),
        "timestep": TIMESTEPS,
    }
    return Inputs(tensors, {**image_sizes(config, 128), "tokens": 154}, steps=patches(config))


@input_builder("FluxTransformer2DModel")
def flux_transformer(config: Config) -> Inputs:
    """Flux: packed latent tokens (2×2 patches), text tokens, and the position of each; timestep in [0, 1]."""
    position = InputRange(0.0, 64.0, "uniform")
    axes = len(config["axes_dims_rope"])
    tensors = {
        "hidden_states": Input(("batch", "image_tokens", config["in_channels"])),
        "encoder_hidden_states": Input(("batch", "tokens", config["joint_attention_dim"])),
        "pooled_projections": Input(("batch", config["pooled_projection_dim"])),
        "timestep": UNIT_TIMESTEPS,
        "img_ids": Input(("image_tokens", axes), None, position),
        "txt_ids": Input(("tokens", axes), None, position),
    }
    if config.get("guidance_embeds"):
        tensors["guidance"] = Input(("batch",), None, InputRange(1.0, 8.0, "uniform"))
    return Inputs(tensors, {"batch": 1, "image_tokens": 4096, "tokens": 512})


@input_builder("WanTransformer3DModel")
def wan_transformer(config: Config) -> Inputs:
    """Wan 2.1: 81 frames at 480p are 21 latent frames of 60×104; an image of 257 CLIP tokens for image-to-video."""
    tensors = {
        "hidden_states": clip(config["in_channels"]),
        "timestep": TIMESTEPS,
        "encoder_hidden_states": Input(("batch", "tokens", config["text_dim"])),
    }
    if config.get("image_dim"):
        # The transformer cuts the joint context into image and text where the text has its trained length.
        tensors["encoder_hidden_states"] = Input(("batch", WAN_TEXT_TOKENS, config["text_dim"]))
        # First and last frame come as two images of each clip.
        images: Dim = Product(("batch",), 2) if config.get("pos_embed_seq_len") else "batch"
        tensors["encoder_hidden_states_image"] = Input((images, CLIP_TOKENS, config["image_dim"]))
    sizes = {"batch": 1, "frames": 21, "height": 60, "width": 104, "tokens": WAN_TEXT_TOKENS}
    return Inputs(tensors, sizes, steps=dict(zip(("frames", "height", "width"), config["patch_size"], strict=True)))


@input_builder("LTXVideoTransformer3DModel")
def ltx_transformer(config: Config) -> Inputs:
    """LTX: 161 frames at 512×768 are 21×16×24 packed tokens; the model takes the three sizes as numbers."""
    tensors = {
        "hidden_states": Input(("batch", Product(("frames", "height", "width")), config["in_channels"])),
        "encoder_hidden_states": Input(("batch", "tokens", config["caption_channels"])),
        "timestep": TIMESTEPS,
        "encoder_attention_mask": text_mask(),
    }
    constants = {
        "num_frames": Number("frames"),
        "height": Number("height"),
        "width": Number("width"),
        "rope_interpolation_scale": (8 / 25, 32.0, 32.0),
    }
    return Inputs(tensors, {"batch": 1, "frames": 21, "height": 16, "width": 24, "tokens": 128}, constants)


@input_builder("HunyuanVideoTransformer3DModel")
def hunyuan_video_transformer(config: Config) -> Inputs:
    """HunyuanVideo: 129 frames at 720×1280 are 33 latent frames of 90×160."""
    tensors = {
        "hidden_states": clip(config["in_channels"]),
        "timestep": TIMESTEPS,
        "encoder_hidden_states": Input(("batch", "tokens", config["text_embed_dim"])),
        "encoder_attention_mask": text_mask(),
        "pooled_projections": Input(("batch", config["pooled_projection_dim"])),
    }
    if config.get("guidance_embeds"):
        tensors["guidance"] = Input(("batch",), None, InputRange(1000.0, 8000.0, "uniform"))
    sizes = {"batch": 1, "frames": 33, "height": 90, "width": 160, "tokens": 256}
    return Inputs(tensors, sizes, steps={**patches(config), "frames": config["patch_size_t"]})


@input_builder("CogVideoXTransformer3DModel")
def cogvideox_transformer(config: Config) -> Inputs:
    """CogVideoX, at the size of its config: 49 frames at 480×720 are 13 latent frames of 60×90."""
    frames = (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1
    patch, patch_t = config["patch_size"], config.get("patch_size_t")
    frames += -frames % (patch_t or 1)
    tensors = {
        "hidden_states": Input(("batch", "frames", config["in_channels"], "height", "width")),
        "encoder_hidden_states": Input(("batch", config["max_text_seq_length"], config["text_embed_dim"])),
        "timestep": TIMESTEPS,
    }
    if config.get("ofs_embed_dim"):
        tensors["ofs"] = Input((1,), None, InputRange(1.0, 4.0, "uniform"))
    if config.get("use_rotary_positional_embeddings"):
        tokens = Product(("frames", "height", "width"), divisor=patch * patch * (patch_t or 1))
        table = Input((tokens, config["attention_head_dim"]), None, InputRange(-1.0, 1.0, "uniform"))
        tensors |= {"image_rotary_emb.0": table, "image_rotary_emb.1": table}
    sizes = {"batch": 1, "frames": frames, "height": config["sample_height"], "width": config["sample_width"]}
    return Inputs(tensors, sizes, steps={**patches(config), "frames": patch_t or 1})


@input_builder("PixArtTransformer2DModel")
def pixart_transformer(config: Config) -> Inputs:
    """PixArt-α and Σ; the 1024-pixel α also takes resolution and aspect ratio."""
    tensors = {
        "hidden_states": image(config["in_channels"]),
        "encoder_hidden_states": Input(("batch", "tokens", config["caption_channels"])),
        "timestep": TIMESTEPS,
        "encoder_attention_mask": text_mask(),
    }
    additional = config.get("use_additional_conditions")
    if config["sample_size"] == 128 if additional is None else additional:
        tensors["added_cond_kwargs.resolution"] = Input(("batch", 2), None, InputRange(256.0, 1024.0, "uniform"))
        tensors["added_cond_kwargs.aspect_ratio"] = Input(("batch", 1), None, InputRange(0.5, 2.0, "uniform"))
    constants = {} if "added_cond_kwargs.resolution" in tensors else {"added_cond_kwargs": NO_CONDITIONS}
    return Inputs(tensors, {**image_sizes(config), "tokens": 120}, constants, patches(config))


@input_builder("LatteTransformer3DModel")
def latte_transformer(config: Config) -> Inputs:
    """Latte: a clip of ``video_length`` frames, with text."""
    tensors = {
        "hidden_states": clip(config["in_channels"]),
        "timestep": TIMESTEPS,
        "encoder_hidden_states": Input(("batch", "tokens", config["caption_channels"])),
    }
    sizes = {**image_sizes(config), "frames": config["video_length"], "tokens": 120}
    return Inputs(tensors, sizes, steps=patches(config))


@input_builder("QwenImageTransformer2DModel")
def qwen_image_transformer(config: Config) -> Inputs:
    """Qwen-Image: packed tokens of a 2×2-patched latent, whose height and width the model takes as numbers.

    Without a mask over the text, as the pipeline calls it where no prompt is padded.
    """
    tensors = {
        "hidden_states": Input(("batch", Product(("height", "width")), config["in_channels"])),
        "encoder_hidden_states": Input(("batch", "tokens", config["joint_attention_dim"])),
        "timestep": UNIT_TIMESTEPS,
    }
    if config.get("guidance_embeds"):
        tensors["guidance"] = Input(("batch",), None, InputRange(1.0, 8.0, "uniform"))
    constants = {"img_shapes": [[(1, Number("height"), Number("width"))]]}
    return Inputs(tensors, {"batch": 1, "height": 64, "width": 64, "tokens": 512}, constants)


@input_builder("ControlNetModel")
def controlnet(config: Config) -> Inputs:
    """ControlNet of Stable Diffusion: the UNet's inputs, and the control image in pixels."""
    unet = unet_2d_condition(config)
    scale = 2 ** (len(config["conditioning_embedding_out_channels"]) - 1)
    pixels = (Product(("height",), scale), Product(("width",), scale))
    condition = Input(("batch", config["conditioning_channels"], *pixels))
    sizes = {**unet.sizes, "height": 64, "width": 64}
    return Inputs({**unet.tensors, "controlnet_cond": condition}, sizes, steps=halvings(config))


@input_builder("AutoencoderKLWan")
def wan_autoencoder(config: Config) -> Inputs:
    """Clip → latent → clip; the number of frames is one more than a multiple of four."""
    sizes = {"batch": 1, "frames": 17, "height": 480, "width": 832}
    return Inputs({"sample": clip(config["in_channels"])}, sizes)
