"""Source: a diffusers pipeline folder: its denoiser alone, or every model that the pipeline runs.

For the denoiser alone the pipeline's own class is never imported: it may be anything, and may not be
installed. For several components it must be one of diffusers' (or this package's): its call is run once,
with models that have shapes and no values, to see what it asks of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optpass.capture import diffusers_model, transformers_model
from optpass.capture.configs import DENOISERS, PIPELINE_INDEX, config_path
from optpass.capture.export import ENTRY, export_program
from optpass.capture.inputs import BUILDERS, Dim, Inputs, inputs_of_example
from optpass.capture.pipeline_calls import MethodCall, observe_calls
from optpass.capture.request import ModelSource, Opened, Request
from optpass.capture.spans import Sizes
from optpass.errors import UserError, nearest
from optpass.ir.program import InputRange, Origin, Program
from optpass.ir.signature import FORWARD
from optpass.ir.weights import Expression, WeightStore
from optpass.runtime.folder import neural_components
from optpass.untrusted import inside, read_json

DESCRIPTION = "a diffusers pipeline: a folder with model_index.json"
LIBRARIES = ("diffusers", "transformers")
GUIDED_BATCH = 2
"""Classifier-free guidance runs the conditional and the unconditional half as one batch."""

Wanted = Callable[[str], Sizes | None]
"""A component's name → sizes by input name that are wished for; ``None`` for one that is not to be captured."""


def recognises(request: Request) -> bool:
    """A folder with ``model_index.json``."""
    return (request.path / PIPELINE_INDEX).is_file()


def capture(request: Request) -> Program:
    """The denoiser (or ``request.component``) as a Program that knows its pipeline and its loop.

    A component's own module, ``unet.mid_block``, knows neither.

    Raises:
        UserError: the index is damaged, leaves the folder, or has no such component.
        WeightError: the component's weights are damaged, or do not fit.
    """
    index = request.path / PIPELINE_INDEX
    components = _components(read_json(index), request.path, index, request.trust_remote_code)
    name, _, inside = _chosen(request, components).partition(".")
    folder = components[name]
    if config_path(folder) is None:
        raise UserError(f"{index} lists the component {name!r}, but {folder} has no config.json")
    denoises = name in DENOISERS and not inside
    part = replace(
        request,
        path=folder,
        component=inside or None,
        loop=denoises,
        defaults={"batch": GUIDED_BATCH} if denoises else {},
    )
    program = _kind(part).capture(part)
    return program if inside else replace(program, origin=_origin(program.origin, request, name))


def capture_components(request: Request, wanted: Wanted, call: Mapping[str, Any]) -> dict[str, Program]:
    """A Program of every model that the pipeline's call runs and that is ``wanted``; the denoiser comes first.

    A Program has an entry for every method that the pipeline calls: ``full`` for the module's own call, else
    the method's name (``decode``). ``call`` are arguments of the pipeline's call (``height``, ``width`` …) from
    which the sizes of all components follow, where ``wanted`` does not give others.

    Raises:
        UserError: the pipeline or a component cannot be loaded, called or captured.
        WeightError: a component's weights are damaged, or do not fit.
    """
    index = request.path / PIPELINE_INDEX
    listed = _components(read_json(index), request.path, index, request.trust_remote_code)
    parts = {name: replace(request, path=listed[name]) for name in neural_components(request.path)}
    asked = {name: sizes for name in parts if (sizes := wanted(name)) is not None}
    models = {name: _plain(part, read=name in asked) for name, part in parts.items()}
    calls = observe_calls(request.path, models, call)
    found = {}
    for name in sorted(asked, key=lambda name: name not in DENOISERS):
        if calls[name]:
            model, dtype = _precise(models.pop(name), parts[name])
            program = _captured(model, calls[name], asked[name], name, dtype)
            found[name] = replace(program, origin=_origin(program.origin, request, name))
    return found


def _plain(part: Request, *, read: bool) -> Opened:
    """A component in float32, as the pipeline around it computes; its weights only if they will be of use."""
    return _kind(part).open_model(
        replace(part, given_dtype=torch.float32, structure_only=part.structure_only or not read)
    )


def _precise(model: Opened, part: Request) -> tuple[Opened, torch.dtype]:
    """The component in the dtype that it is captured in, and that dtype.

    A model that says of itself that half precision overflows in it (``force_upcast``) stays in float32.
    """
    upcast = part.given_dtype is None and bool(getattr(getattr(model.module, "config", None), "force_upcast", False))
    dtype = torch.float32 if upcast else part.dtype
    if dtype == torch.float32:
        return model, dtype
    return _kind(part).open_model(replace(part, given_dtype=dtype)), dtype


def _captured(model: Opened, calls: Mapping[str, MethodCall], sizes: Sizes, name: str, dtype: torch.dtype) -> Program:
    declared = _declared(model)
    inputs = {method: _inputs(call, declared if method == FORWARD else None) for method, call in calls.items()}
    known = {method: item.tensors.keys() | item.sizes.keys() for method, item in inputs.items()}
    for stray in sizes.keys() - set().union(*known.values()):
        tensors = [each for item in inputs.values() for each in item.tensors]
        raise UserError(f"the pipeline gives {name} no input {stray!r}{nearest(stray, tensors)}")
    programs = {}
    for method, call in calls.items():
        own = {key: shape for key, shape in sizes.items() if key in known[method]}
        with called_as(model.module, method):
            program = export_program(
                model.module,
                model.mode,
                inputs[method].arguments(own, {}, dtype),
                model.checkpoint,
                model.origin,
                ranges={**call.ranges(), **(declared.ranges if declared else {})},
                loop=name in DENOISERS and method == FORWARD,
            )
        graph = program.entries[ENTRY]
        graph.signature = replace(graph.signature, method=method, parameters=call.parameters)
        programs[ENTRY if method == FORWARD else method] = program
    return _joined(programs)


def _inputs(call: MethodCall, declared: Inputs | None) -> Inputs:
    """The observed tensors and their sizes; where a builder declares the same, by the names of its dimensions."""
    seen = inputs_of_example(call.arguments)
    tensors, sizes = dict(seen.tensors), dict(seen.sizes)
    for name, tensor in (declared.tensors if declared else {}).items():
        if name not in tensors or len(tensors[name].dims) != len(tensor.dims):
            continue
        shape = [seen.sizes[str(dim)] for dim in tensors[name].dims]
        shared = _agreed(tensor.dims, shape, sizes)
        if shared is not None:
            tensors[name] = replace(tensors[name], dims=tensor.dims)
            sizes |= shared
    # Times and scales come as float32 numbers to models of every precision; all else comes in the model's own.
    for name, tensor in tensors.items():
        if tensor.dtype is not None and tensor.dtype.is_floating_point and len(tensor.dims) > 1:
            tensors[name] = replace(tensor, dtype=None)
    used = {dim for tensor in tensors.values() for dim in tensor.dims}
    steps = declared.steps if declared else {}
    return Inputs(tensors, {dim: size for dim, size in sizes.items() if dim in used}, seen.constants, steps)


def _agreed(dims: Sequence[Dim], shape: Sequence[int], sizes: Mapping[str, int]) -> dict[str, int] | None:
    """The named ones of ``dims`` at ``shape``; ``None`` where that is not what the builder or another input says."""
    found: dict[str, int] = {}
    for dim, size in zip(dims, shape, strict=True):
        expected = {**sizes, **found}.get(dim, size) if isinstance(dim, str) else dim
        if expected != size:
            return None
        found |= {dim: size} if isinstance(dim, str) else {}
    return found


@contextmanager
def called_as(module: nn.Module, method: str) -> Iterator[None]:
    """``module(...)`` is ``module.method(...)`` meanwhile, module paths and weight names as ever."""
    if method != FORWARD:
        module.forward = getattr(module, method)
    try:
        yield
    finally:
        module.__dict__.pop("forward", None)


def _joined(programs: Mapping[str, Program]) -> Program:
    """One Program of several entries; weights of one name are one tensor of the checkpoint."""
    first, *_ = programs.values()
    weights: dict[str, Expression] = {}
    ranges: dict[str, InputRange] = {}
    for program in programs.values():
        weights |= dict(program.weights)
        ranges |= program.ranges
    entries = {name: program.entries[ENTRY] for name, program in programs.items()}
    return replace(first, entries=entries, weights=WeightStore(weights), ranges=ranges)


def _declared(model: Opened) -> Inputs | None:
    """What the model's input builder says; ``None`` for a model without one, or one of another configuration."""
    from optpass.capture import inputs_diffusers

    assert inputs_diffusers
    builder, config = BUILDERS.get(type(model.module).__name__), getattr(model.module, "config", None)
    try:
        return builder(config) if builder and isinstance(config, Mapping) else None
    except (UserError, KeyError, TypeError, ValueError):
        return None


def _kind(part: Request) -> ModelSource:
    kinds: tuple[ModelSource, ...] = (diffusers_model, transformers_model)
    for kind in kinds:
        if kind.recognises(part):
            return kind
    raise UserError(
        f"{part.path}/config.json names neither a diffusers class (_class_name) nor a transformers model_type"
    )


def _origin(origin: Origin, request: Request, name: str) -> Origin:
    return replace(origin, path=request.path.resolve(), component=name, pipeline=True)


def _components(index: Mapping[str, Any], folder: Path, path: Path, trust: bool) -> dict[str, Path]:
    """Component names and folders; every name in the index is checked, not only the chosen one."""
    found: dict[str, Path] = {}
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list):
            continue
        parts = [part for part in entry if part is not None]
        if not all(isinstance(part, str) for part in parts):
            raise UserError(f"{path} is damaged: {name!r} is not a pair of library and class")
        inside(folder, name, path)
        for part in parts:
            inside(folder, part, path)
        if not parts:
            continue
        if parts[0] not in LIBRARIES and (folder / name / f"{parts[0]}.py").is_file() and not trust:
            raise UserError(
                f"{path}: the component {name!r} is Python code of the checkpoint ({name}/{parts[0]}.py); nothing in a "
                "checkpoint runs: read that code, then pass --trust-remote-code if you trust it"
            )
        found[name] = folder / name
    return found


def _chosen(request: Request, components: Mapping[str, Path]) -> str:
    if request.component is not None:
        if request.component.partition(".")[0] not in components:
            hint = nearest(request.component, components)
            raise UserError(f"{request.path} has no component {request.component!r}{hint}")
        return request.component
    for name in DENOISERS:
        if name in components:
            return name
    known = ", ".join(sorted(components)) or "none"
    raise UserError(f"{request.path} has no denoiser ({' or '.join(DENOISERS)}); components to choose from: {known}")
