"""Source: a Python factory, ``path/to/file.py:function``, which returns the model.

This runs the user's own file: it is what they asked for. The factory is called while parameters take
no memory and have no values, so it should only build the module; the weights are given apart, as a
``.safetensors`` or pickled (weights-only) file. Example inputs come from a second function of the
file, ``<function>_inputs`` or ``example_inputs``, that returns keyword arguments by name (or a tuple
of positional ones), from the model where diffusers or timm made it, or from the sizes the user gives::

    def classifier():
        return Classifier(width=64)

    def classifier_inputs():
        return {"image": torch.zeros(1, 3, 32, 32)}

Both functions are called with the capture's dtype as torch's default: floats for which they name none follow it.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from optpass.capture.export import build_fake, default_dtype
from optpass.capture.inputs import BUILDERS, Inputs, given_inputs, inputs_of_example
from optpass.capture.inputs_timm import timm_inputs
from optpass.capture.opened import captured, opened
from optpass.capture.request import Request
from optpass.capture.timm_import import timm_importable
from optpass.errors import UserError, nearest
from optpass.ir.program import Program
from optpass.quiet import first_lines

DESCRIPTION = "a Python factory: path/to/file.py:function, with its weights as --weights FILE"
EXAMPLE = "example_inputs"


def split(source: str) -> tuple[Path, str]:
    """``path/to/file.py:function`` → its two halves; the second is empty for any other source."""
    file, colon, function = source.rpartition(":")
    return (Path(file), function) if colon and file.endswith(".py") else (Path(source), "")


def recognises(request: Request) -> bool:
    """A ``.py`` file and a function's name."""
    return bool(request.function)


def capture(request: Request) -> Program:
    """What the factory returns, or the module in it that ``request.component`` names.

    Structure only without ``request.weights``.

    Raises:
        UserError: the file or function is missing or fails, or returns no module.
        WeightError: the weights are damaged, or do not fit.
    """
    with timm_importable(), _loaded(request.path) as namespace:
        build = _function(namespace, request)
        built = build_fake(lambda: _built(build, request), request.dtype)
        model = opened(request, built, request.checkpoint, library=request.path.stem, kind="factory")
        return captured(request, model, _inputs(namespace, model.module, request))


@contextmanager
def _loaded(path: Path) -> Iterator[ModuleType]:
    """The user's file as a module, its folder importable meanwhile."""
    if not path.is_file():
        raise UserError(f"no Python file at {path}")
    spec = importlib.util.spec_from_file_location(f"optpass_factory_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    sys.modules[spec.name] = module
    try:
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise UserError(f"{path} fails on import: {type(error).__name__}: {first_lines(error)}") from error
        yield module
    finally:
        sys.path.remove(folder)
        del sys.modules[spec.name]


def _function(namespace: ModuleType, request: Request) -> Any:
    found = getattr(namespace, request.function, None)
    if not callable(found):
        functions = [name for name, value in vars(namespace).items() if callable(value) and not name.startswith("_")]
        raise UserError(f"{request.path} has no function {request.function!r}{nearest(request.function, functions)}")
    return found


def _built(build: Any, request: Request) -> nn.Module:
    try:
        module = build()
    except Exception as error:
        where = f"{request.path}:{request.function}"
        raise UserError(f"{where} fails: {type(error).__name__}: {first_lines(error)}") from error
    if not isinstance(module, nn.Module):
        raise UserError(f"{request.path}:{request.function} returns {type(module).__name__}, not a torch.nn.Module")
    return module


def _inputs(namespace: ModuleType, module: nn.Module, request: Request) -> Inputs:
    example = getattr(namespace, f"{request.function}_inputs", None) or getattr(namespace, EXAMPLE, None)
    if example is not None and not request.component:
        with default_dtype(request.dtype):
            values = example() if callable(example) else example
        return inputs_of_example(_named(values, module, request))
    builder = BUILDERS.get(type(module).__name__)
    if builder is not None and isinstance(getattr(module, "config", None), Mapping):
        return builder(module.config)  # type: ignore[arg-type]
    if (image := timm_inputs(module)) is not None:
        return image
    try:
        return given_inputs(module, request.sizes)
    except UserError as error:
        raise UserError(f"{error}; or write a function {request.function}_inputs() into {request.path.name}") from error


def _named(example: Any, module: nn.Module, request: Request) -> dict[str, Any]:
    parameters = inspect.signature(module.forward).parameters
    if isinstance(example, Mapping):
        for name in example:
            if name not in parameters:
                hint = nearest(str(name), parameters)
                raise UserError(f"{request.path}: the example gives {name!r}, no argument of the model{hint}")
        return dict(example)
    values = example if isinstance(example, (tuple, list)) else (example,)
    if len(values) > len(parameters):
        raise UserError(f"{request.path}: {len(values)} example inputs for a model that takes {len(parameters)}")
    return dict(zip(parameters, values, strict=False))
