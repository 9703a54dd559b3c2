"""A module built with fake parameters, its inputs and its weights → the Program that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from optpass.capture.export import export_program
from optpass.capture.inputs import Inputs
from optpass.capture.request import Request
from optpass.capture.submodule import submodule
from optpass.ir.program import Origin, Program
from optpass.ir.weights import Expression


def module_program(
    request: Request,
    built: tuple[nn.Module, FakeTensorMode],
    inputs: Callable[[nn.Module], Inputs],
    checkpoint: dict[str, Expression] | None,
    *,
    library: str,
    kind: str = "",
    config: Mapping[str, Any] | None = None,
) -> Program:
    """Export what :func:`optpass.capture.export.build_fake` built, or the module in it at ``request.component``.

    ``inputs`` says what the exported module takes; the sizes are the request's. ``checkpoint`` is ``None``
    for a structure-only capture. The Program's origin is of ``kind`` (default: the library's name).

    Raises:
        UserError: there is no such module, the sizes are impossible, or torch.export refuses the model.
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
    if request.component:
        module, checkpoint, origin = submodule(module, checkpoint, origin, request.component)
    taken = inputs(module)
    example = taken.arguments(request.sizes, request.defaults, request.dtype)
    return export_program(module, mode, example, checkpoint, origin, ranges=taken.ranges, loop=request.loop)
