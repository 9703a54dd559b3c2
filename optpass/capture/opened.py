"""A module built with fake parameters and its weights → the model that was asked for, and its Program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from optpass.capture.export import export_program
from optpass.capture.inputs import Inputs
from optpass.capture.request import Opened, Request
from optpass.capture.submodule import submodule
from optpass.errors import CaptureError
from optpass.ir.program import Origin, Program
from optpass.ir.weights import Expression, dtype_name


def opened(
    request: Request,
    built: tuple[nn.Module, FakeTensorMode],
    checkpoint: dict[str, Expression] | None,
    *,
    library: str,
    kind: str = "",
    config: Mapping[str, Any] | None = None,
) -> Opened:
    """What :func:`optpass.capture.export.build_fake` built, or the module in it at ``request.component``.

    ``checkpoint`` is ``None`` for a structure-only capture. The origin is of ``kind`` (default: the
    library's name).

    Raises:
        UserError: there is no such module.
    """
    module, mode = built
    origin = Origin(
        kind=kind or library,
        path=request.path.resolve(),
        component=request.function,
        library=library,
        class_name=type(module).__name__,
        config=dict(config or {}),
    )
    if request.component:
        module, checkpoint, origin = submodule(module, checkpoint, origin, request.component)
    return Opened(module, mode, checkpoint, origin)


def captured(request: Request, model: Opened, inputs: Inputs) -> Program:
    """Export ``model``, called with ``inputs`` of the sizes that ``request`` gives.

    Raises:
        UserError: the sizes are impossible, or torch.export refuses the model.
        WeightError: the weights do not fit.
    """
    example = inputs.arguments(request.sizes, request.defaults, request.dtype)
    try:
        return export_program(
            model.module, model.mode, example, model.checkpoint, model.origin, ranges=inputs.ranges, loop=request.loop
        )
    except CaptureError as error:
        if request.given_dtype is not None or request.dtype == torch.float32:
            raise
        # Some models make float32 values on the way (images as bytes), which half-precision weights do not take.
        raise CaptureError(
            f"{error}; it was captured in {dtype_name(request.dtype)}, as its weights are: try --dtype float32"
        ) from error
