"""Inputs of timm models, which say their own image size."""

from __future__ import annotations

import inspect
import sys

from torch import nn

from optpass.capture.inputs import Input, Inputs


def timm_inputs(module: nn.Module) -> Inputs | None:
    """The image that a model built by timm takes, [batch, channels, height, width]; ``None`` for any other module.

    Height and width are fixed where timm says that the model's are.
    """
    # Only a timm that made the module is asked, so it is loaded; before 1.0.31 it could not answer.
    describe = getattr(sys.modules.get("timm.models"), "get_model_input_config", None)
    if describe is None or not hasattr(module, "pretrained_cfg"):
        return None
    described = describe(module)
    name = next(iter(inspect.signature(module.forward).parameters))
    channels, height, width = (int(n) for n in described["input_size"])
    if described["fixed_input_size"]:
        return Inputs({name: Input(("batch", channels, height, width))}, {"batch": 1})
    image = Input(("batch", channels, "height", "width"))
    return Inputs({name: image}, {"batch": 1, "height": height, "width": width})
