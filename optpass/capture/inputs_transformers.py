"""Inputs of transformers models, from ``main_input_name`` and the configuration's usual keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from optpass.capture.inputs import Input, Inputs, input_builder, integers
from optpass.errors import UserError

Config = Mapping[str, Any]

TEXT_TOKENS = 77
IMAGE_SIZE = 224


def transformers_inputs(module: nn.Module, config: Config) -> Inputs:
    """The main input of any image, video or text model.

    Raises:
        UserError: the main input is of another kind (audio, tabular …).
    """
    main = str(getattr(module, "main_input_name", ""))
    constants = {"use_cache": False} if config.get("use_cache") and _takes(module, "use_cache") else {}
    if main == "pixel_values":
        return images(config, constants)
    if main == "input_ids":
        return texts(config, constants)
    raise UserError(
        f"optpass does not know the inputs of {type(module).__name__} (its main input is {main!r}): "
        "give the sizes of all of them with --inputs NAME=1x3x8x8, or register an @input_builder"
    )


def _takes(module: nn.Module, name: str) -> bool:
    import inspect

    return name in inspect.signature(module.forward).parameters


def images(config: Config, constants: Config | None = None) -> Inputs:
    """``pixel_values``: [batch, channels, height, width], with frames second for video models."""
    size = config.get("image_size") or IMAGE_SIZE
    height, width = (size, size) if isinstance(size, int) else size
    channels = config.get("num_channels") or 3
    sizes = {"batch": 1, "height": height, "width": width}
    dims: tuple[int | str, ...] = ("batch", channels, "height", "width")
    if config.get("tubelet_size") or config.get("num_frames"):
        dims = ("batch", "frames", *dims[1:])
        sizes["frames"] = config.get("num_frames") or 16
    return Inputs({"pixel_values": Input(dims)}, sizes, constants or {})


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
