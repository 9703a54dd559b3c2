"""Inputs of diffusers models, by family. Default sizes are those that the config was trained at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optpass.capture.inputs import TIMESTEP, TIMESTEPS, Input, Inputs, input_builder, integers
from optpass.errors import UserError
from optpass.ir.program import InputRange

Config = Mapping[str, Any]

TEXT_TOKENS = 77
UNSIZED = 32
"""Latent height and width where a config does not say (``sample_size`` is ``null``)."""


def image_sizes(config: Config, default: int = UNSIZED) -> dict[str, int]:
    """Batch 1 and the height and width of ``sample_size``, a number or a pair."""
    size = config.get("sample_size") or default
    height, width = (size, size) if isinstance(size, int) else size
    return {"batch": 1, "height": height, "width": width}


def image(channels: int) -> Input:
    """[batch, channels, height, width]."""
    return Input(("batch", channels, "height", "width"))


@input_builder("UNet2DModel")
def unet_2d(config: Config) -> Inputs:
    """Unconditional or class-conditional image UNet."""
    tensors = {"sample": image(config["in_channels"]), "timestep": TIMESTEP}
    return Inputs(tensors | class_labels(config), image_sizes(config))


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
    return Inputs(tensors, {**image_sizes(config), "tokens": TEXT_TOKENS})


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
    return Inputs(tensors, {**image_sizes(config), "frames": config.get("num_frames") or 14})


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
    return Inputs(tensors, sizes)


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
    return Inputs(tensors, {**image_sizes(config, 128), "tokens": 154})


@input_builder("FluxTransformer2DModel")
def flux_transformer(config: Config) -> Inputs:
    """Flux: packed latent tokens (2×2 patches), text tokens, and the position of each; timestep in [0, 1]."""
    unit = Input(("batch",), None, InputRange(0.0, 1.0, "uniform"))
    position = InputRange(0.0, 64.0, "uniform")
    axes = len(config["axes_dims_rope"])
    tensors = {
        "hidden_states": Input(("batch", "image_tokens", config["in_channels"])),
        "encoder_hidden_states": Input(("batch", "tokens", config["joint_attention_dim"])),
        "pooled_projections": Input(("batch", config["pooled_projection_dim"])),
        "timestep": unit,
        "img_ids": Input(("image_tokens", axes), None, position),
        "txt_ids": Input(("tokens", axes), None, position),
    }
    if config.get("guidance_embeds"):
        tensors["guidance"] = Input(("batch",), None, InputRange(1.0, 8.0, "uniform"))
    return Inputs(tensors, {"batch": 1, "image_tokens": 4096, "tokens": 512})


@input_builder("WanTransformer3DModel")
def wan_transformer(config: Config) -> Inputs:
    """Wan 2.1: 81 frames at 480p are 21 latent frames of 60×104.

    Raises:
        UserError: the config is an image-to-video one, with image tokens beside the text.
    """
    if config.get("image_dim"):
        raise UserError("the image-to-video form of Wan has no input builder; register one for it")
    tensors = {
        "hidden_states": Input(("batch", config["in_channels"], "frames", "height", "width")),
        "timestep": TIMESTEPS,
        "encoder_hidden_states": Input(("batch", "tokens", config["text_dim"])),
    }
    return Inputs(tensors, {"batch": 1, "frames": 21, "height": 60, "width": 104, "tokens": 512})
