"""Source: a diffusers model folder, or its bare config (structure only)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from optpass.capture.configs import config_path, model_config, refuse_remote_code
from optpass.capture.export import build_fake
from optpass.capture.inputs import BUILDERS, Inputs, given_inputs
from optpass.capture.opened import captured, opened
from optpass.capture.request import Opened, Request
from optpass.errors import UserError, nearest
from optpass.ir.program import Program
from optpass.ir.weights import Expression
from optpass.quiet import first_lines, quiet

DESCRIPTION = "a diffusers model: a folder with config.json (or that file alone, structure only)"
CLASS = "_class_name"


def recognises(request: Request) -> bool:
    """A config with diffusers' ``_class_name``."""
    return CLASS in model_config(request.path)


def capture(request: Request) -> Program:
    """The model's ``forward``, its weights those of the folder, or absent when it has none.

    ``request.component`` names a submodule that is captured alone. A whole model that takes a sample and a timestep
    is one that a sampler calls in a loop, whether its pipeline is there or not.

    Raises:
        UserError: the class is unknown, the config does not build it, or it has remote code.
        WeightError: the weights are damaged, or do not fit.
    """
    model = open_model(request)
    looped = replace(request, loop=request.loop or request.component is None)
    return captured(looped, model, _inputs(model.module, request))


def open_model(request: Request) -> Opened:
    """The model with fake parameters, and its weights.

    Raises:
        UserError: as :func:`capture`.
        WeightError: the weights are damaged.
    """
    config, path = model_config(request.path), config_path(request.path)
    assert path is not None
    refuse_remote_code(config, path, request.trust_remote_code)
    model_class = _model_class(config, path)
    with quiet("diffusers", logging.CRITICAL):
        built = build_fake(lambda: _build(model_class, config, path), request.dtype)
    return opened(request, built, _weights(built[0], request), library="diffusers", config=config)


def _model_class(config: Mapping[str, Any], path: Path) -> Any:
    import diffusers

    name = str(config[CLASS])
    if config.get("auto_map"):
        return _remote_class(config, path)
    # Only diffusers' own list of models is consulted: a name from a checkpoint must not reach anything else.
    known = {model for model in diffusers._import_structure["models"] if model.isidentifier()}
    if name not in known:
        raise UserError(f"{path}: diffusers has no model class {name!r}{_hint(name, known)}")
    found = getattr(diffusers, name)
    if not (isinstance(found, type) and issubclass(found, nn.Module) and hasattr(found, "load_config")):
        raise UserError(f"{path}: diffusers' {name} is not a model that can be captured")
    return found


def _hint(name: str, known: set[str]) -> str:
    hint = nearest(name, known)
    return hint if "did you mean" in hint else ""


def _remote_class(config: Mapping[str, Any], path: Path) -> Any:
    from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module

    reference = str(config["auto_map"].get("AutoModel", "")) if isinstance(config["auto_map"], dict) else ""
    module, _, name = reference.rpartition(".")
    if not module or "--" in reference or not all(part.isidentifier() for part in reference.split(".")):
        raise UserError(f"{path}: auto_map names no class of this folder for AutoModel ({reference!r})")
    return get_class_from_dynamic_module(
        str(path.parent), f"{module}.py", class_name=name, local_files_only=True, trust_remote_code=True
    )


def _build(model_class: Any, config: Mapping[str, Any], path: Path) -> nn.Module:
    try:
        module: nn.Module = model_class.from_config(dict(config))
    except Exception as error:
        raise UserError(f"{path} does not build a {model_class.__name__}: {first_lines(error)}") from error
    return module


def _inputs(module: nn.Module, request: Request) -> Inputs:
    from optpass.capture import inputs_diffusers

    assert inputs_diffusers
    builder, config = BUILDERS.get(type(module).__name__), getattr(module, "config", None)
    if builder is None or config is None:
        return given_inputs(module, request.sizes)
    try:
        return builder(config)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the config of this {type(module).__name__} does not say its inputs: {type(error).__name__}: {error}"
        ) from error


def _weights(module: Any, request: Request) -> dict[str, Expression] | None:
    found = request.checkpoint
    if found is not None:
        # Old checkpoints name attention's projections query, key, value; only keys are touched.
        module._fix_state_dict_keys_on_load(found)
    return found
