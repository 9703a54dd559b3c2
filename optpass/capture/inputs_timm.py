"""Inputs of timm models, which say their own image size."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import nn

from optpass.capture.inputs import Input, Inputs


def timm_inputs(module: nn.Module) -> Inputs | None:
    """The image that a model built by timm takes, [batch, channels, height, width]; ``None`` for any other module.

    Height and width are fixed where timm says that the model's are.
    """
    config = getattr(module, "pretrained_cfg", None)
    size = config.get("input_size") if isinstance(config, Mapping) else None
    if not size or len(size) != 3:
        return None
    assert isinstance(config, Mapping)
    name = next(iter(inspect.signature(module.forward).parameters))
    channels, height, width = (int(n) for n in size)
    if config.get("fixed_input_size"):
        return Inputs({name: Input(("batch", channels, height, width))}, {"batch": 1})
    image = Input(("batch", channels, "height", "width"))
    return Inputs({name: image}, {"batch": 1, "height": height, "width": width})
