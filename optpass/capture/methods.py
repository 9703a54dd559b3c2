"""Methods of a diffusers model → the entries of a Program: for models that take another one's place in a pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from optpass.capture import diffusers_model
from optpass.capture.checkpoint_weights import weight_file
from optpass.capture.configs import config_path
from optpass.capture.diffusers_pipeline import called_as
from optpass.capture.export import ENTRY, export_program
from optpass.capture.inputs import Input, Inputs
from optpass.capture.pipeline_calls import register_output_classes
from optpass.capture.request import Opened, Request
from optpass.capture.spans import Span
from optpass.errors import UserError
from optpass.ir.dimensions import Dimensions, Size
from optpass.ir.graph import Graph
from optpass.ir.weights import Expression, WeightStore


@dataclass(frozen=True)
class Taken:
    """The one tensor that a method is called with: its shape (open sizes by name), their ranges, its dtype."""

    shape: tuple[Size, ...]
    dimensions: Dimensions
    dtype: torch.dtype


@dataclass(frozen=True)
class Methods:
    """Graphs by method, their weights, and what the model is."""

    graphs: Mapping[str, Graph]
    weights: WeightStore
    class_name: str
    config: Any


def capture_methods(folder: Path, calls: Mapping[str, Taken], *, structure_only: bool) -> Methods:
    """Capture ``calls`` of the diffusers model in ``folder``, each a method with its first argument.

    Raises:
        UserError: the folder holds no model of diffusers, no such method, or one that cannot be captured.
        WeightError: its weights are damaged, or do not fit.
    """
    if not folder.exists():
        raise UserError(f"there is no {folder}: a folder of a diffusers model is needed")
    request = Request(folder, structure_only=structure_only, given_dtype=_dtype(calls))
    if config_path(folder) is None or not diffusers_model.recognises(request):
        raise UserError(f"{folder} holds no model of diffusers: a folder with its config.json is needed")
    register_output_classes()
    opened = diffusers_model.open_model(request)
    graphs: dict[str, Graph] = {}
    weights: dict[str, Expression] = {}
    for method, taken in calls.items():
        if not callable(getattr(opened.module, method, None)):
            raise UserError(f"{folder}: a {type(opened.module).__name__} has no method {method!r}")
        program = _captured(opened, method, taken)
        graphs[method] = program.entries[ENTRY]
        weights |= dict(program.weights)
    return Methods(graphs, WeightStore(weights), type(opened.module).__name__, getattr(opened.module, "config", {}))


def model_files(folder: Path) -> tuple[Path, ...]:
    """The config of a model folder, and its weight file where it has one."""
    return tuple(path for path in (config_path(folder), weight_file(folder)) if path is not None)


def _captured(opened: Opened, method: str, taken: Taken) -> Any:
    name = next(iter(inspect.signature(getattr(opened.module, method)).parameters))
    spans = {item.name: Span(item.minimum, item.maximum, item.step) for item in taken.dimensions}
    inputs = Inputs({name: Input(taken.shape)}, taken.dimensions.examples)
    example = inputs.arguments({key: (span,) for key, span in spans.items()}, {}, taken.dtype)
    with called_as(opened.module, method):
        return export_program(opened.module, opened.mode, example, opened.checkpoint, opened.origin)


def _dtype(calls: Mapping[str, Taken]) -> torch.dtype:
    return next((taken.dtype for taken in calls.values()), torch.float32)
