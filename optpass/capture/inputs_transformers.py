"""Inputs of transformers models, from ``main_input_name`` and the configuration's usual keys."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

from torch import nn

from optpass.capture.inputs import Input, Inputs, input_builder, integers
from optpass.capture.spans import Sizes
from optpass.errors import UserError

Config = Mapping[str, Any]

TEXT_TOKENS = 77
IMAGE_SIZE = 224
PIXELS = "pixel_values"
INTERPOLATE = "interpolate_pos_encoding"


def transformers_inputs(module: nn.Module, config: Config) -> Inputs:
    """The main input of any image, video or text model.

    Raises:
        UserError: the main input is of another kind (audio, tabular …).
    """
    main = str(getattr(module, "main_input_name", ""))
    constants = {"use_cache": False} if config.get("use_cache") and _takes(module, "use_cache") else {}
    if main == PIXELS:
        return images(config, constants)
    if main == "input_ids":
        return texts(config, constants)
    raise UserError(
        f"optpass does not know the inputs of {type(module).__name__} (its main input is {main!r}): "
        "give the sizes of all of them with --inputs NAME=1x3x8x8, or register an @input_builder"
    )


def resampled(inputs: Inputs, module: nn.Module, sizes: Sizes) -> Inputs:
    """``inputs`` that have a model resample the positions it learned, where ``sizes`` ask for another image size.

    Without being asked (``interpolate_pos_encoding``), such a model refuses every size but its own.
    """
    if PIXELS not in inputs.tensors or not _takes(module, INTERPOLATE):
        return inputs
    dims = inputs.tensors[PIXELS].dims
    asked: dict[Any, Any] = dict(zip(dims, sizes.get(PIXELS, ()), strict=False))
    asked |= {dim: sizes[dim][0] for dim in dims if isinstance(dim, str) and dim in sizes}
    learned = {dim: inputs.sizes.get(str(dim), dim) for dim in dims[-2:]}
    if all(asked.get(dim, size) == size for dim, size in learned.items()):
        return inputs
    return replace(inputs, constants={**inputs.constants, INTERPOLATE: True})


def _takes(module: nn.Module, name: str) -> bool:
    return name in inspect.signature(module.forward).parameters


def images(config: Config, constants: Config | None = None) -> Inputs:
    """``pixel_values``: [batch, channels, height, width], with frames second for video models.

    The size is the config's or its backbone's; a model of neither takes any, and gets 224×224.
    """
    backbone = config.get("backbone_config") or {}
    size = config.get("image_size") or backbone.get("image_size") or IMAGE_SIZE
    height, width = (size, size) if isinstance(size, int) else size
    channels = config.get("num_channels") or 3
    sizes = {"batch": 1, "height": height, "width": width}
    dims: tuple[int | str, ...] = ("batch", channels, "height", "width")
    if config.get("tubelet_size") or config.get("num_frames"):
        dims = ("batch", "frames", *dims[1:])
        sizes["frames"] = config.get("num_frames") or 16
    return Inputs({PIXELS: Input(dims)}, sizes, constants or {})


def texts(config: Config, constants: Config | None = None) -> Inputs:
    """``input_ids``: [batch, tokens], as many tokens as the model has positions and at most CLIP's 77."""
    tokens = min(config.get("max_position_embeddings") or TEXT_TOKENS, TEXT_TOKENS)
    ids = integers(("batch", "tokens"), config["vocab_size"])
    return Inputs({"input_ids": ids}, {"batch": 1, "tokens": tokens}, constants or {})


@input_builder("CLIPModel", "SiglipModel")
def image_and_text(config: Config) -> Inputs:
    """Contrastive pairs: as many texts as images."""
    text, picture = texts(config["text_config"]), images(config["vision_config"])
    return Inputs({**text.tensors, **picture.tensors}, {**text.sizes, **picture.sizes})


@input_builder("Sam2VideoMemoryAttention")
def memory_attention(config: Config) -> Inputs:
    """SAM 2's features of a frame, as many tokens as its positions, and a memory of earlier frames and objects.

    Tensors are [tokens, batch, channels]. ``memory`` counts the tokens of whole frames, and of the object
    pointers behind them, which have no position.
    """
    tokens, hidden = prod(config["memory_attention_rope_feat_sizes"]), config["memory_attention_hidden_size"]
    channels = config["memory_encoder_output_channels"]
    pointers = config["max_object_pointers_in_encoder"] * (hidden // channels)
    frame, memory = Input((tokens, "batch", hidden)), Input(("memory_tokens", "batch", channels))
    return Inputs(
        {
            "current_vision_features": frame,
            "memory": memory,
            "current_vision_position_embeddings": frame,
            # The library's own spelling.
            "memory_posision_embeddings": memory,
        },
        {"batch": 1, "memory_tokens": config["num_maskmem"] * tokens + pointers},
        {"num_object_pointer_tokens": pointers},
    )
