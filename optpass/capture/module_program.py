"""A module built with fake parameters, its inputs and its weights → the Program that was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from optpass.capture.export import export_program
from optpass.capture.inputs import Inputs
from optpass.capture.request import Request
from optpass.ir.program import Origin, Program
from optpass.ir.weights import Expression


def module_program(
    request: Request,
    built: tuple[nn.Module, FakeTensorMode],
    inputs: Inputs,
    checkpoint: Mapping[str, Expression] | None,
    *,
    library: str,
    kind: str = "",
    config: Mapping[str, Any] | None = None,
) -> Program:
    """Export what :func:`optpass.capture.export.build_fake` built, with ``inputs`` of the sizes that ``request`` gives.

    ``checkpoint`` is ``None`` for a structure-only capture. The Program's origin is of ``kind``
    (default: the library's name).

    Raises:
        UserError: the sizes are impossible, or torch.export refuses the model.
        WeightError: the weights do not fit.
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
    arguments = inputs.arguments(request.sizes, request.defaults, request.dtype)
    return export_program(module, mode, arguments, checkpoint, origin, ranges=inputs.ranges, loop=request.loop)
